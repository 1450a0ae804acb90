//! Memory that a worker reuses from block to block, and the copy between packed and full matrices.

use crate::layout::{row_base, triangle};

/// A worker's memory for the matrices of one block.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `A`, then its factor `U`, upper triangle by rows.
    pub upper: Vec<f64>,
    /// `M = U⁻ᵀ`, lower triangle by rows, zero above.
    pub lower: Vec<f64>,
    /// Vectors of a block.
    pub row: Vec<f64>,
    /// A packed triangle.
    pub packed: Vec<f64>,
}

/// Return the first `len` elements of `v`, with unspecified contents.
pub(crate) fn room(v: &mut Vec<f64>, len: usize) -> &mut [f64] {
    if v.len() < len {
        v.resize(len, 0.0);
    }
    &mut v[..len]
}

/// Make `v` hold `len` zeros.
pub(crate) fn zeros(v: &mut Vec<f64>, len: usize) -> &mut [f64] {
    v.clear();
    v.resize(len, 0.0);
    v
}

/// Write a packed triangle as a full symmetric matrix with rows `stride` apart.
pub(crate) fn unpack(packed: &[f64], size: usize, full: &mut [f64], stride: usize) {
    debug_assert_eq!(packed.len(), triangle(size));
    for i in 0..size {
        let base = row_base(size, i);
        full[i * stride + i..i * stride + size].copy_from_slice(&packed[base + i..base + size]);
        for j in i + 1..size {
            full[j * stride + i] = packed[base + j];
        }
    }
}
