//! Cholesky factors and inverses of matrices in double precision, in the cache of one worker; those of
//! large ones are in [`panels`].
//!
//! The rows of a matrix of size `b` are `stride = padded(b)` apart. Rows are built in registers from
//! the finished ones (left-looking), so each product costs one load and no store. That beats a
//! general library at these sizes, and the pieces are shared: `A = UᵀU`, `M = U⁻ᵀ`, `A⁻¹ = MᵀM`.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::isa::{Isa, Set};
use crate::panels::{self, Panels};
use crate::parallel::checkpoint_at;
use crate::simd::{dispatch, padded, Kernel, Simd};

/// Vectors of a row that are built at a time.
const VECTORS: usize = 8;

/// Rows that are built together from those above them: each load then serves that many products.
const ROWS: usize = 4;

/// `to[from..] -= sum_k factor(k) * row(k)[from..]` over rows `k` in `over`.
///
/// Reads and writes whole vectors from `from` rounded down to `padded(size)`.
///
/// # Safety
/// `to` and every `row(k)` are valid for `padded(size)` elements, and the processor has the instruction
/// set.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // raw parts of two matrices and a row
unsafe fn subtract_rows<S: Simd<T = f64>>(
    to: *mut f64,
    from: usize,
    size: usize,
    rows: *const f64,
    stride: usize,
    over: Range<usize>,
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
    over: Range<usize>,
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

/// [`subtract_rows`] for [`ROWS`] rows `to`, `stride` apart; `factors` of the rows are contiguous.
///
/// # Safety
/// As [`subtract_rows`], for each row.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // raw parts of two matrices and a panel
unsafe fn subtract_panel<S: Simd<T = f64>>(
    to: *mut f64,
    columns: Range<usize>,
    rows: *const f64,
    stride: usize,
    over: impl Fn(usize) -> Range<usize>,
    factors: *const f64,
    factor_stride: usize,
) {
    let mut column = columns.start / S::W * S::W;
    while column < columns.end {
        let left = (columns.end - column).div_ceil(S::W);
        let over = over(column);
        // SAFETY: the caller's matrices are valid for whole vectors of these columns.
        unsafe {
            let (to, rows) = (to.add(column), rows.add(column));
            // Four vectors of four rows need more than sixteen registers.
            column += S::W
                * match left {
                    1 => panel_tile::<S, 1>(to, rows, stride, over, factors, factor_stride),
                    2 | 3 => panel_tile::<S, 2>(to, rows, stride, over, factors, factor_stride),
                    _ if matches!(S::SET, Set::Avx512) => {
                        panel_tile::<S, 4>(to, rows, stride, over, factors, factor_stride)
                    }
                    _ => panel_tile::<S, 2>(to, rows, stride, over, factors, factor_stride),
                };
        }
    }
}

/// `NV` vectors of [`subtract_panel`]; `NV`.
#[inline(always)]
unsafe fn panel_tile<S: Simd<T = f64>, const NV: usize>(
    to: *mut f64,
    rows: *const f64,
    stride: usize,
    over: Range<usize>,
    factors: *const f64,
    factor_stride: usize,
) -> usize {
    // SAFETY: the caller's pointers are valid for NV vectors of each row.
    unsafe {
        let mut sum = [[S::zero(); NV]; ROWS];
        for k in over {
            let row = rows.add(k * stride);
            let row: [S::V; NV] = std::array::from_fn(|v| S::load(row.add(v * S::W)));
            for r in 0..ROWS {
                let factor = S::splat(factors.add(k * factor_stride + r));
                for v in 0..NV {
                    sum[r][v] = S::mul_add(factor, row[v], sum[r][v]);
                }
            }
        }
        let minus = -1.0;
        let minus = S::splat(&raw const minus);
        for r in 0..ROWS {
            for v in 0..NV {
                let to = to.add(r * stride + v * S::W);
                S::store(to, S::mul_add(minus, sum[r][v], S::load(to)));
            }
        }
    }
    NV
}

/// Subtract `sum_k factors[k * factor_stride] * rows[k]`, the first `count` rows, `stride` apart.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // two matrices and a row
pub(crate) fn subtract_row<S: Simd<T = f64>>(
    _simd: S,
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
    let size = to.len();
    assert!(size.is_multiple_of(S::W) && size <= stride && rows.len() >= count * stride);
    assert!(factors.len() > (count - 1) * factor_stride);
    let (rows, factors) = (rows.as_ptr(), factors.as_ptr());
    // SAFETY: the assertions make `to`, the rows and the factors valid; `_simd` is the proof of the
    // instruction set.
    unsafe {
        let to = to.as_mut_ptr();
        subtract_rows::<S>(to, 0, size, rows, stride, 0..count, factors, factor_stride);
    }
}

/// Factor `A = UᵀU` in place, upper triangle by rows; false when `A` is not positive definite in
/// double precision. Entries below the diagonal are scratch.
pub(crate) fn cholesky(isa: Isa, a: &mut [f64], size: usize, panels: &mut Panels) -> bool {
    cholesky_rows(isa, a, size, size, panels)
}

/// The first `rows` rows of the factor in place: `[U W]` from `A = [UᵀU, UᵀW; ·, ·]`. The other rows are
/// not touched.
pub(crate) fn cholesky_rows(
    isa: Isa,
    a: &mut [f64],
    size: usize,
    rows: usize,
    panels: &mut Panels,
) -> bool {
    if size >= panels::SMALLEST {
        return panels::cholesky_rows(isa, a, size, rows, panels);
    }
    factor(isa, a, size, rows, padded(size))
}

/// [`cholesky_rows`] of a matrix in a cache, whose rows are `stride` apart.
pub(crate) fn factor(isa: Isa, a: &mut [f64], size: usize, rows: usize, stride: usize) -> bool {
    dispatch(isa, Cholesky { a, size, rows, stride })
}

struct Cholesky<'a> {
    a: &'a mut [f64],
    size: usize,
    rows: usize,
    stride: usize,
}

impl Kernel<f64> for Cholesky<'_> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, _simd: S) -> bool {
        let Self { a, size, rows, stride } = self;
        assert!(stride >= padded(size) && a.len() >= size * stride && rows <= size);
        for start in (0..rows).step_by(ROWS) {
            checkpoint_at(start, size);
            let end = rows.min(start + ROWS);
            // Rows above the panel serve all of its rows at once, if it is whole.
            let mut done = 0;
            if end - start == ROWS {
                // A pointer is valid until the matrix is next used as a slice, so each call has its own.
                let base = a.as_mut_ptr();
                // SAFETY: the panel and the rows above it lie in `a`; their factors are the
                // panel's columns of the rows above. `_simd` is the proof of the instruction set.
                unsafe {
                    let (to, factors) = (base.add(start * stride), base.add(start));
                    let over = |_| 0..start;
                    subtract_panel::<S>(to, start..size, base, stride, over, factors, stride);
                }
                done = start;
            }
            for i in start..end {
                let base = a.as_mut_ptr();
                // SAFETY: row i and the rows above it lie in `a`; factors are column i of those.
                unsafe {
                    let (to, factors) = (base.add(i * stride), base.add(i));
                    subtract_rows::<S>(to, i, size, base, stride, done..i, factors, stride);
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
        }
        true
    }
}

/// Compute `M = U⁻ᵀ`, lower triangle by rows (zero above), from the `U` of [`cholesky`]; rows of both
/// are `stride` apart.
pub(crate) fn invert_factor(
    isa: Isa,
    u: &[f64],
    m: &mut [f64],
    size: usize,
    stride: usize,
    panels: &mut Panels,
) {
    if size >= panels::SMALLEST {
        return panels::invert_factor(isa, u, m, size, stride, panels);
    }
    dispatch(isa, InvertFactor { u, m, size, stride });
}

struct InvertFactor<'a> {
    u: &'a [f64],
    m: &'a mut [f64],
    size: usize,
    stride: usize,
}

impl Kernel<f64> for InvertFactor<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, _simd: S) {
        let Self { u, m, size, stride } = self;
        assert!(stride >= padded(size));
        assert!(u.len() >= size * stride && m.len() >= size * stride);
        m[..size * stride].fill(0.0);
        let factor = u.as_ptr();
        for start in (0..size).step_by(ROWS) {
            checkpoint_at(start, size);
            let end = size.min(start + ROWS);
            let mut done = 0;
            if end - start == ROWS {
                let base = m.as_mut_ptr();
                // SAFETY: as in the factorization; row k is zero beyond column k, so that each
                // stretch of columns begins with the row of its start.
                unsafe {
                    let (to, over) = (base.add(start * stride), |column| column..start);
                    let factors = factor.add(start);
                    subtract_panel::<S>(to, 0..start, base, stride, over, factors, stride);
                }
                done = start;
            }
            for i in start..end {
                m[i * stride + i] = 1.0;
                let base = m.as_mut_ptr();
                // SAFETY: rows done..i of `m` and of `u` are valid for padded(size) elements.
                unsafe {
                    let (to, factors) = (base.add(i * stride), factor.add(i));
                    subtract_rows::<S>(to, 0, i, base, stride, done..i, factors, stride);
                }
                let scale = 1.0 / u[i * stride + i];
                for x in &mut m[i * stride..i * stride + i + 1] {
                    *x *= scale;
                }
            }
        }
    }
}

/// Add up products in lanes, the same on every processor.
#[inline(always)]
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += a * b;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Solve `UᵀU x = b` in place. Inlined into the kernels that end with it.
#[inline(always)]
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
        x[i] = (x[i] - dot(row, &x[i + 1..size])) / u[i * stride + i];
    }
}

#[cfg(test)]
mod tests;
