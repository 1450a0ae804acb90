//! Factors of squares of vectors, in register tiles of four rows.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use crate::layout::triangle;
use crate::simd::Simd;

/// Rows that are formed together.
pub(super) const ROWS: usize = 4;

/// Turn the square of `A` into those of `U` and `M`, and add up the diagonal; `C` columns of four rows at a time.
///
/// # Safety
/// `square` is valid for `rows` rows of vectors that are `stride` vectors apart, `pivots` and `diagonal`
/// for `rows` vectors; `rows` is a multiple of four and at most `stride`; the processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn invert<S: Simd<T = f64>, const C: usize>(
    square: *mut f64,
    pivots: *mut f64,
    diagonal: *mut f64,
    rows: usize,
    stride: usize,
) {
    let w = S::W;
    let at = |i: usize, j: usize| square.wrapping_add((i * stride + j) * w);
    let (one, minus) = (1.0, -1.0);
    // SAFETY: all places are of rows and columns below `rows`.
    unsafe {
        let (one, minus) = (S::splat(&raw const one), S::splat(&raw const minus));
        let mut i = 0;
        while i < rows {
            // The square on the diagonal: its factor, the reciprocals of the diagonal of that, and the
            // factor's inverse.
            for j in (i..i + ROWS).step_by(C) {
                let known = products::<S, C>(at(0, i), at(0, j), i, stride);
                for r in 0..ROWS {
                    for c in 0..C {
                        let to = at(i + r, j + c);
                        S::store(to, S::mul_add(minus, known[r][c], S::load(to)));
                    }
                }
            }
            let mut u = [[S::zero(); ROWS]; ROWS];
            let mut scale = [S::zero(); ROWS];
            for r in 0..ROWS {
                for c in r..ROWS {
                    let mut x = S::load(at(i + r, i + c));
                    for q in 0..r {
                        x = S::mul_add(S::mul(minus, u[q][r]), u[q][c], x);
                    }
                    if c == r {
                        S::store(pivots.wrapping_add((i + r) * w), x);
                        scale[r] = S::div(one, S::sqrt(x));
                    } else {
                        u[r][c] = S::mul(x, scale[r]);
                    }
                }
            }
            // Negated: what the solutions below subtract.
            let mut factor = [[S::zero(); ROWS]; ROWS];
            for r in 0..ROWS {
                for q in 0..r {
                    factor[r][q] = S::mul(minus, u[q][r]);
                }
            }
            for c in 0..ROWS {
                let mut m = [S::zero(); ROWS];
                let mut sum = S::load(diagonal.wrapping_add((i + c) * w));
                for r in 0..ROWS {
                    if r == c {
                        m[r] = scale[r];
                    } else if r > c {
                        let mut x = S::zero();
                        for q in c..r {
                            x = S::mul_add(factor[r][q], m[q], x);
                        }
                        m[r] = S::mul(x, scale[r]);
                    }
                    sum = S::mul_add(m[r], m[r], sum);
                    S::store(at(i + r, i + c), m[r]);
                }
                S::store(diagonal.wrapping_add((i + c) * w), sum);
            }
            // The rows of `U` right of it.
            for j in (i + ROWS..rows).step_by(C) {
                let known = products::<S, C>(at(0, i), at(0, j), i, stride);
                for c in 0..C {
                    let mut x = [S::zero(); ROWS];
                    for r in 0..ROWS {
                        let to = at(i + r, j + c);
                        let mut sum = S::mul_add(minus, known[r][c], S::load(to));
                        for q in 0..r {
                            sum = S::mul_add(factor[r][q], x[q], sum);
                        }
                        x[r] = S::mul(sum, scale[r]);
                        S::store(to, x[r]);
                    }
                }
            }
            // The rows of `M` left of it; its columns begin on the diagonal.
            for j in (0..i).step_by(C) {
                let from = j / ROWS * ROWS;
                let known = products::<S, C>(at(from, i), at(from, j), i - from, stride);
                for c in 0..C {
                    let mut x = [S::zero(); ROWS];
                    let place = diagonal.wrapping_add((j + c) * w);
                    let mut total = S::load(place);
                    for r in 0..ROWS {
                        let mut sum = S::mul(minus, known[r][c]);
                        for q in 0..r {
                            sum = S::mul_add(factor[r][q], x[q], sum);
                        }
                        x[r] = S::mul(sum, scale[r]);
                        total = S::mul_add(x[r], x[r], total);
                        S::store(at(i + r, j + c), x[r]);
                    }
                    S::store(place, total);
                }
            }
            i += ROWS;
        }
    }
}

/// `sum_k left[k][r] * right[k][c]` over `count` rows, `stride` vectors apart.
///
/// # Safety
/// Both are valid for `count` rows of that many vectors, and the processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn products<S: Simd<T = f64>, const C: usize>(
    left: *const f64,
    right: *const f64,
    count: usize,
    stride: usize,
) -> [[S::V; C]; ROWS] {
    // SAFETY: by contract.
    unsafe {
        let mut sum = [[S::zero(); C]; ROWS];
        let mut offset = 0;
        for _ in 0..count {
            let (left, right) = (left.wrapping_add(offset), right.wrapping_add(offset));
            let right: [S::V; C] = std::array::from_fn(|c| S::load(right.wrapping_add(c * S::W)));
            for r in 0..ROWS {
                let factor = S::load(left.wrapping_add(r * S::W));
                for c in 0..C {
                    sum[r][c] = S::mul_add(factor, right[c], sum[r][c]);
                }
            }
            offset += stride * S::W;
        }
        sum
    }
}

/// Add `sum_k columns[k][i] * columns[k][j]` over `count` columns, `stride` numbers apart, to the entries
/// `(i, j)`, `j <= i < rows`, of a lower triangle stored row by row; `C` columns of four rows at a time.
///
/// # Safety
/// `lower` is valid for a triangle of `rows` rows of vectors, `columns` for `count` columns of `rows`
/// vectors; `rows` is a multiple of four; the processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn add_products<S: Simd<T = f64>, const C: usize>(
    lower: *mut f64,
    columns: *const f64,
    rows: usize,
    stride: usize,
    count: usize,
) {
    for i in (0..rows).step_by(ROWS) {
        // SAFETY: rows and columns of all tiles are below `rows`.
        unsafe {
            for j in (0..i).step_by(C) {
                add_tile::<S, C, false>(lower, columns, (i, j), stride, count);
            }
            for j in (i..i + ROWS).step_by(C) {
                add_tile::<S, C, true>(lower, columns, (i, j), stride, count);
            }
        }
    }
}

/// The tile of [`add_products`] that begins at `(i, j)`; `DIAGONAL` where a part of it is above the
/// diagonal, which is not touched.
///
/// # Safety
/// As above, for rows from `i` on and columns from `j` on.
#[inline(always)]
unsafe fn add_tile<S: Simd<T = f64>, const C: usize, const DIAGONAL: bool>(
    lower: *mut f64,
    columns: *const f64,
    (i, j): (usize, usize),
    stride: usize,
    count: usize,
) {
    let w = S::W;
    let to = |r: usize, c: usize| lower.wrapping_add((triangle(i + r) + j + c) * w);
    // SAFETY: by contract; of the triangle only its own places are touched.
    unsafe {
        let mut sum = [[S::zero(); C]; ROWS];
        for r in 0..ROWS {
            for c in 0..C {
                if !DIAGONAL || j + c <= i + r {
                    sum[r][c] = S::load(to(r, c));
                }
            }
        }
        let (mut left, mut right) = (columns.add(i * w), columns.add(j * w));
        for _ in 0..count {
            let column: [S::V; C] = std::array::from_fn(|c| S::load(right.add(c * w)));
            for r in 0..ROWS {
                let factor = S::load(left.add(r * w));
                for c in 0..C {
                    sum[r][c] = S::mul_add(factor, column[c], sum[r][c]);
                }
            }
            (left, right) = (left.wrapping_add(stride), right.wrapping_add(stride));
        }
        for r in 0..ROWS {
            for c in 0..C {
                if !DIAGONAL || j + c <= i + r {
                    S::store(to(r, c), sum[r][c]);
                }
            }
        }
    }
}
