//! Small symmetric positive definite matrices in double precision, in one worker's cache.
//!
//! A matrix of size `b` has rows `stride = padded(b)` apart. Rows are built in registers from the
//! finished ones (left-looking), so each product costs one load and no store. That beats a general
//! library at these sizes, and the pieces are shared: `A = UᵀU`, `M = U⁻ᵀ`, `A⁻¹ = MᵀM`.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use crate::gram::{add_gram, padded};
use crate::layout::{row_base, triangle};
use crate::simd::Simd;

/// Vectors of a row that are built at a time.
const VECTORS: usize = 8;

/// A worker's memory for matrices of one block.
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

/// Make `v` hold `len` zeros.
pub(crate) fn zeros(v: &mut Vec<f64>, len: usize) -> &mut [f64] {
    v.clear();
    v.resize(len, 0.0);
    v
}

/// `to[from..] = scale * (to[from..] - sum_k factor(k) * row(k)[from..])` over rows `k` in `over`.
///
/// Reads and writes whole vectors from `from` rounded down to `padded(size)`.
///
/// # Safety
/// `to` and every `row(k)` are valid for `padded(size)` elements, and the instruction set is here.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // raw parts of two matrices and a row
unsafe fn subtract_rows<S: Simd<T = f64>>(
    to: *mut f64,
    from: usize,
    size: usize,
    rows: *const f64,
    stride: usize,
    over: std::ops::Range<usize>,
    factors: *const f64,
    factor_stride: usize,
) {
    let mut column = from / S::W * S::W;
    while column < size {
        let left = (size - column).div_ceil(S::W);
        // SAFETY: columns up to padded(size) of `to` and of the rows in `over` are valid.
        unsafe {
            let at = |k: usize| rows.add(k * stride + column);
            let factor = |k: usize| factors.add(k * factor_stride);
            let to = to.add(column);
            match left {
                1 => subtract::<S, 1>(to, at, factor, over.clone()),
                2 => subtract::<S, 2>(to, at, factor, over.clone()),
                3 => subtract::<S, 3>(to, at, factor, over.clone()),
                4 => subtract::<S, 4>(to, at, factor, over.clone()),
                5 => subtract::<S, 5>(to, at, factor, over.clone()),
                6 => subtract::<S, 6>(to, at, factor, over.clone()),
                7 => subtract::<S, 7>(to, at, factor, over.clone()),
                _ => subtract::<S, VECTORS>(to, at, factor, over.clone()),
            }
        }
        column += VECTORS * S::W;
    }
}

/// `NV` vectors of [`subtract_rows`]; `at(k)` and `factor(k)` point at row `k`'s part and factor.
#[inline(always)]
unsafe fn subtract<S: Simd<T = f64>, const NV: usize>(
    to: *mut f64,
    at: impl Fn(usize) -> *const f64,
    factor: impl Fn(usize) -> *const f64,
    over: std::ops::Range<usize>,
) {
    // Two sets of sums, taken in turn, halve the wait of one product for the one before.
    // SAFETY: the caller's pointers are valid for NV vectors.
    unsafe {
        let (mut even, mut odd) = ([S::zero(); NV], [S::zero(); NV]);
        let mut k = over.start;
        while k + 1 < over.end {
            let (row, f) = (at(k), S::splat(factor(k)));
            for v in 0..NV {
                even[v] = S::mul_add(f, S::load(row.add(v * S::W)), even[v]);
            }
            let (row, f) = (at(k + 1), S::splat(factor(k + 1)));
            for v in 0..NV {
                odd[v] = S::mul_add(f, S::load(row.add(v * S::W)), odd[v]);
            }
            k += 2;
        }
        if k < over.end {
            let (row, f) = (at(k), S::splat(factor(k)));
            for v in 0..NV {
                even[v] = S::mul_add(f, S::load(row.add(v * S::W)), even[v]);
            }
        }
        let minus = -1.0;
        let minus = S::splat(&raw const minus);
        for v in 0..NV {
            let to = to.add(v * S::W);
            S::store(to, S::mul_add(minus, S::add(even[v], odd[v]), S::load(to)));
        }
    }
}

/// `to -= sum_k factors[k * factor_stride] * rows[k]` over the first `count` rows of `stride` each.
#[inline(always)]
pub(crate) fn subtract_row<S: Simd<T = f64>>(
    to: &mut [f64],
    rows: &[f64],
    stride: usize,
    count: usize,
    factors: &[f64],
    factor_stride: usize,
) {
    if count == 0 {
        return;
    }
    assert!(to.len() >= stride && rows.len() >= count * stride && stride.is_multiple_of(S::W));
    assert!(factors.len() > (count - 1) * factor_stride);
    let (rows, factors) = (rows.as_ptr(), factors.as_ptr());
    // SAFETY: the assertions make `to`, the rows and the factors valid.
    unsafe {
        let to = to.as_mut_ptr();
        subtract_rows::<S>(to, 0, stride, rows, stride, 0..count, factors, factor_stride);
    }
}

/// Cholesky factor `A = UᵀU` in place, upper triangle by rows; false when `A` is not positive
/// definite in double precision. What lies below the diagonal is scratch.
#[inline(always)]
pub(crate) fn cholesky<S: Simd<T = f64>>(a: &mut [f64], size: usize) -> bool {
    let stride = padded(size);
    assert!(a.len() >= size * stride);
    let base = a.as_mut_ptr();
    for i in 0..size {
        // SAFETY: row i and the rows above it lie in `a`; factors are column i of those rows.
        unsafe {
            subtract_rows::<S>(
                base.add(i * stride),
                i,
                size,
                base,
                stride,
                0..i,
                base.add(i),
                stride,
            );
        }
        let row = &mut a[i * stride + i..i * stride + size];
        let pivot = row[0];
        // `!(x > 0)` also catches NaN.
        if !(pivot > 0.0 && pivot.is_finite()) {
            return false;
        }
        let scale = 1.0 / pivot.sqrt();
        for x in row {
            *x *= scale;
        }
    }
    true
}

/// `M = U⁻ᵀ`, lower triangle by rows (zero above), from `U` of [`cholesky`]; row by row to `each`.
#[inline(always)]
pub(crate) fn invert<S: Simd<T = f64>>(
    u: &[f64],
    m: &mut [f64],
    size: usize,
    mut each: impl FnMut(&[f64]),
) {
    let stride = padded(size);
    assert!(u.len() >= size * stride && m.len() >= size * stride);
    let (factor, base) = (u.as_ptr(), m.as_mut_ptr());
    for i in 0..size {
        m[i * stride..(i + 1) * stride].fill(0.0);
        m[i * stride + i] = 1.0;
        // Row k is zero beyond column k: each stretch of columns begins with the row of its start.
        let mut column = 0;
        while column < i {
            let end = (column + VECTORS * S::W).min(padded(i));
            // SAFETY: rows column..i of `m` and of `u` are valid for padded(size) elements.
            unsafe {
                let to = base.add(i * stride);
                subtract_rows::<S>(to, column, end, base, stride, column..i, factor.add(i), stride);
            }
            column = end;
        }
        let scale = 1.0 / u[i * stride + i];
        let row = &mut m[i * stride..i * stride + i + 1];
        for x in row.iter_mut() {
            *x *= scale;
        }
        each(row);
    }
}

/// `A⁻¹ = MᵀM` as a packed upper triangle.
#[inline(always)]
pub(crate) fn inverse_packed<S: Simd<T = f64>>(m: &[f64], size: usize, packed: &mut [f64]) {
    packed.fill(0.0);
    add_gram::<S>(m, size, size, padded(size), packed);
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

/// Solve `UᵀU x = b` in place.
pub(crate) fn solve(u: &[f64], size: usize, x: &mut [f64]) {
    let stride = padded(size);
    for i in 0..size {
        x[i] /= u[i * stride + i];
        let (done, rest) = x[..size].split_at_mut(i + 1);
        for (x, u) in rest.iter_mut().zip(&u[i * stride + i + 1..i * stride + size]) {
            *x -= u * done[i];
        }
    }
    for i in (0..size).rev() {
        let row = &u[i * stride + i + 1..i * stride + size];
        let known: f64 = row.iter().zip(&x[i + 1..size]).map(|(u, x)| u * x).sum();
        x[i] = (x[i] - known) / u[i * stride + i];
    }
}
