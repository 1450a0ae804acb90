//! Memory that a worker reuses from block to block, and the copy between packed and full matrices.

use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::layout::{row_base, triangle};
use crate::memory::Aligned;
use crate::panels::{self, Panels};
use crate::simd::{padded, Real};

/// A worker's memory for the matrices of one block.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `A`, then its factor `U`, upper triangle by rows.
    pub upper: Aligned<f64>,
    /// `M = U⁻ᵀ`, lower triangle by rows, zero above.
    pub lower: Aligned<f64>,
    /// Vectors of a block.
    pub row: Aligned<f64>,
    /// A packed triangle.
    pub packed: Aligned<f64>,
    /// What large blocks are processed in.
    pub panels: Panels,
    /// Weights of the largest block that there is room for.
    reserved: usize,
}

impl Scratch {
    /// Make room for everything that is done with a block of `size` weights, one of `count` that are
    /// processed at the same time, so that no large allocation comes later, where it could not fail.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] when there is no memory for a block of this size.
    pub fn reserve(&mut self, size: usize, count: usize) -> Result<()> {
        const WHAT: &str = "the matrices of a block";
        if size <= self.reserved {
            return Ok(());
        }
        let stride = padded(size);
        // A row more than the matrix: of one weight, `swept` has two rows of columns.
        let matrix = size.saturating_add(1).saturating_mul(stride);
        self.upper.reserve(WHAT, matrix.max(panels::columns_len(size)))?;
        self.lower.reserve(WHAT, matrix)?;
        self.row.reserve(WHAT, stride.saturating_mul(4))?;
        self.packed.reserve(WHAT, triangle(size))?;
        self.panels.reserve(WHAT, size, count)?;
        self.reserved = size;
        Ok(())
    }
}

/// An error of any worker; their results then do not count.
#[derive(Default)]
pub(crate) struct Failure(OnceLock<Error>);

impl Failure {
    /// Record an error; whether there is none.
    pub fn check(&self, result: Result<()>) -> bool {
        // The first error is as good as any other.
        result.map_err(|error| self.0.set(error)).is_ok()
    }

    /// Return `value`, or the error.
    pub fn or<T>(self, value: T) -> Result<T> {
        self.0.into_inner().map_or(Ok(value), Err)
    }
}

/// Write a packed triangle as a full symmetric matrix with rows `stride` apart.
pub(crate) fn unpack<T: Real>(packed: &[T], size: usize, full: &mut [f64], stride: usize) {
    debug_assert_eq!(packed.len(), triangle(size));
    // Squares of a cache line: a column of the matrix alone would write one number of each line.
    const SQUARE: usize = 8;
    for top in (0..size).step_by(SQUARE) {
        let rows = top..size.min(top + SQUARE);
        for i in rows.clone() {
            let row = &packed[row_base(size, i) + i..row_base(size, i) + size];
            for (to, x) in full[i * stride + i..i * stride + size].iter_mut().zip(row) {
                *to = (*x).into();
            }
        }
        for j in top + 1..size {
            let rows = top..rows.end.min(j);
            for (to, i) in full[j * stride + top..].iter_mut().zip(rows) {
                *to = packed[row_base(size, i) + j].into();
            }
        }
    }
}
