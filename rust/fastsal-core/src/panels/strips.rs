//! The columns of a strip, in register tiles of a few rows.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::{Panel, Shared, HEIGHT, ROWS};
use crate::isa::Set;
use crate::layout::row_base;
use crate::simd::{padded, prefetch, Kernel, Simd};

/// The most columns of a strip.
pub(super) const WIDEST: usize = 32;

/// Rows that are multiplied at a time: that many of a strip lie in a first-level cache.
const DEPTH: usize = 256;

/// Rows ahead that are requested from memory: each is in a page of its own, which nothing foresees.
const SOON: usize = 16;

/// Number of columns of a strip.
pub(super) struct Width;

impl Kernel<f64> for Width {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, _simd: S) -> usize {
        const { assert!(vectors::<S>() * S::W <= WIDEST) };
        vectors::<S>() * S::W
    }
}

/// Vectors of a strip. With six rows of more than two, sums would not stay in sixteen registers.
const fn vectors<S: Simd>() -> usize {
    if matches!(S::SET, Set::Avx512) {
        4
    } else {
        2
    }
}

/// Work on a strip of `NV` vectors of columns.
pub(super) trait OnStrip {
    fn run<S: Simd<T = f64>, const NV: usize>(self, simd: S);
}

/// The kernel of it, with as many vectors as the instruction set has registers for.
pub(super) struct Strip<W>(pub W);

impl<W: OnStrip> Kernel<f64> for Strip<W> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) {
        if const { vectors::<S>() == 4 } {
            self.0.run::<S, 4>(simd);
        } else {
            self.0.run::<S, 2>(simd);
        }
    }
}

/// [`Panel::solve`] for the columns of a strip.
pub(super) struct Solution<'a> {
    /// `[groups, depth, ROWS]`
    pub left: &'a [f64],
    /// The matrix; of this strip alone are `columns` of the rows of `panel`.
    pub x: Shared,
    pub panel: Panel,
    pub first: usize,
    pub columns: Range<usize>,
    pub is_solved: bool,
    pub strip: &'a mut [f64],
}

impl OnStrip for Solution<'_> {
    #[inline(always)]
    fn run<S: Simd<T = f64>, const NV: usize>(self, _simd: S) {
        let Self { left, x, panel, first, columns, is_solved, strip } = self;
        let Panel { start, height, stride, .. } = panel;
        let (width, known, groups) = (NV * S::W, start - first, height.div_ceil(ROWS));
        let depth = left.len() / HEIGHT;
        assert!(first <= start && height <= HEIGHT && columns.len() <= width);
        assert!(depth >= start + groups * ROWS);
        assert!(strip.len() >= (known + groups * ROWS) * width);
        let (left, strip) = (left.as_ptr(), strip.as_mut_ptr());
        let left = |group: usize, k: usize| left.wrapping_add((group * depth + k) * ROWS);
        let at = |row: usize| strip.wrapping_add(row * width);
        // SAFETY: the strip and what is packed hold all rows, by the assertions; of the matrix only its own
        // columns, and nothing above the panel is written; `_simd` is the proof.
        unsafe {
            for k in 0..known + groups * ROWS {
                let is_row = k < known + height;
                let count = if is_row { columns.len() } else { 0 };
                let from = x.at((first + k) * stride + columns.start);
                prefetch(from.wrapping_add(SOON * stride));
                pack::<S, NV>(from, at(k), count);
            }
            for k in (0..known).step_by(DEPTH) {
                let count = DEPTH.min(known - k);
                for g in 0..groups {
                    let sum = products::<S, NV>(left(g, first + k), at(k), count);
                    add_multiple::<S, NV>(at(known + g * ROWS), -1.0, &sum);
                }
            }
            if is_solved {
                for g in 0..groups {
                    let sum = products::<S, NV>(left(g, start), at(known), g * ROWS);
                    solve::<S, NV>(at(known + g * ROWS), &sum, left(g, start + g * ROWS));
                }
            }
            for k in 0..height {
                let (from, to) = (at(known + k), x.at((start + k) * stride + columns.start));
                copy::<S, NV>(from, to, columns.len());
            }
        }
    }
}

/// The columns of a strip of `MᵀM`, down to the diagonal.
pub(super) struct Product<'a> {
    /// The columns of `M`, `[groups, size, ROWS]`, from the diagonal on.
    pub groups: &'a [f64],
    /// `[size, padded(size)]`
    pub m: &'a [f64],
    pub size: usize,
    pub columns: Range<usize>,
    /// The upper triangle; of this strip alone are `columns`.
    pub packed: Shared,
    pub strip: &'a mut [f64],
}

impl OnStrip for Product<'_> {
    #[inline(always)]
    fn run<S: Simd<T = f64>, const NV: usize>(self, _simd: S) {
        let Self { groups, m, size, columns, packed, strip } = self;
        let (width, stride) = (NV * S::W, padded(size));
        let (start, known) = (columns.start, size - columns.start);
        let rows = columns.end.next_multiple_of(ROWS);
        assert!(columns.len() <= width && columns.end <= size && m.len() >= size * stride);
        assert!(strip.len() >= (known + rows) * width && groups.len() >= rows * size);
        let (m, left, strip) = (m.as_ptr(), groups.as_ptr(), strip.as_mut_ptr());
        let left = |group: usize, k: usize| left.wrapping_add((group * size + k) * ROWS);
        let at = |row: usize| strip.wrapping_add(row * width);
        // SAFETY: the strip, the groups and the matrix hold all rows, by the assertions; of the triangle
        // only its own columns are written; `_simd` is the proof.
        unsafe {
            for k in 0..known {
                let from = m.wrapping_add((start + k) * stride + start);
                prefetch(from.wrapping_add(SOON * stride));
                pack::<S, NV>(from, at(k), columns.len());
            }
            at(known).write_bytes(0, rows * width);
            for k in (0..known).step_by(DEPTH) {
                let count = DEPTH.min(known - k);
                for g in 0..rows / ROWS {
                    // Rows of a group that begins below are zero up to its diagonal, and not packed.
                    let later = (g * ROWS).saturating_sub(start + k).min(count);
                    let (left, right) = (left(g, start + k + later), at(k + later));
                    let sum = products::<S, NV>(left, right, count - later);
                    add_multiple::<S, NV>(at(known + g * ROWS), 1.0, &sum);
                }
            }
            for i in 0..columns.end {
                let from = start.max(i);
                let to = packed.at(row_base(size, i) + from);
                let row = at(known + i).wrapping_add(from - start);
                copy::<S, NV>(row, to, columns.end - from);
            }
        }
    }
}

/// Copy `count` numbers to the vectors of a row of a strip; the others are zero.
#[inline(always)]
unsafe fn pack<S: Simd<T = f64>, const NV: usize>(from: *const f64, to: *mut f64, count: usize) {
    // SAFETY: both are valid for what is copied, by contract.
    unsafe {
        if count < NV * S::W {
            to.write_bytes(0, NV * S::W);
        }
        copy::<S, NV>(from, to, count);
    }
}

/// Copy `count` numbers, in whole vectors where they fill a row of a strip.
#[inline(always)]
unsafe fn copy<S: Simd<T = f64>, const NV: usize>(from: *const f64, to: *mut f64, count: usize) {
    // SAFETY: both are valid for what is copied, by contract.
    unsafe {
        if count == NV * S::W {
            for v in 0..NV {
                S::store(to.wrapping_add(v * S::W), S::load(from.wrapping_add(v * S::W)));
            }
        } else {
            std::ptr::copy_nonoverlapping(from, to, count);
        }
    }
}

/// `sum_k left[k][r] * right[k][c]` over `count` rows of packed columns and of a strip.
#[inline(always)]
unsafe fn products<S: Simd<T = f64>, const NV: usize>(
    left: *const f64,
    right: *const f64,
    count: usize,
) -> [[S::V; NV]; ROWS] {
    // SAFETY: by contract.
    unsafe {
        let mut sum = [[S::zero(); NV]; ROWS];
        for k in 0..count {
            let (left, right) = (left.wrapping_add(k * ROWS), right.wrapping_add(k * NV * S::W));
            let row: [S::V; NV] = std::array::from_fn(|v| S::load(right.wrapping_add(v * S::W)));
            for r in 0..ROWS {
                let factor = S::splat(left.wrapping_add(r));
                for v in 0..NV {
                    sum[r][v] = S::mul_add(factor, row[v], sum[r][v]);
                }
            }
        }
        sum
    }
}

/// Add a multiple of sums to the rows of a tile.
#[inline(always)]
unsafe fn add_multiple<S: Simd<T = f64>, const NV: usize>(
    to: *mut f64,
    factor: f64,
    sum: &[[S::V; NV]; ROWS],
) {
    // SAFETY: by contract.
    unsafe {
        let factor = S::splat(&raw const factor);
        for r in 0..ROWS {
            for v in 0..NV {
                let to = to.wrapping_add((r * NV + v) * S::W);
                S::store(to, S::mul_add(factor, sum[r][v], S::load(to)));
            }
        }
    }
}

/// Subtract sums from the rows of a tile and solve for them with the square `U` of the diagonal.
#[inline(always)]
unsafe fn solve<S: Simd<T = f64>, const NV: usize>(
    to: *mut f64,
    sum: &[[S::V; NV]; ROWS],
    u: *const f64,
) {
    // SAFETY: by contract.
    unsafe {
        let minus = -1.0;
        let minus = S::splat(&raw const minus);
        for v in 0..NV {
            let mut x = [S::zero(); ROWS];
            for r in 0..ROWS {
                let to = to.wrapping_add((r * NV + v) * S::W);
                let mut rest = S::mul_add(minus, sum[r][v], S::load(to));
                for q in 0..r {
                    let factor = S::mul(minus, S::splat(u.wrapping_add(q * ROWS + r)));
                    rest = S::mul_add(factor, x[q], rest);
                }
                let scale = 1.0 / *u.wrapping_add(r * ROWS + r);
                x[r] = S::mul(rest, S::splat(&raw const scale));
                S::store(to, x[r]);
            }
        }
    }
}
