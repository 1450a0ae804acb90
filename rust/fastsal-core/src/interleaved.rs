//! Inverses of small blocks, or their diagonals, one block in each lane of a vector.
//!
//! In a small block most vectors of a row are short and every step waits for the one before; here
//! each operation is one of several blocks. `A = UᵀU` and `M = U⁻ᵀ` are formed together, four rows at a
//! time, `U` above the diagonal of one square and `M` below it; `(A⁻¹)_jj` is the sum of squares of column
//! `j` of `M`, and `A⁻¹ = MᵀM`.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

mod elimination;
mod tiles;

use crate::isa::Set;
use crate::layout::triangle;
use crate::memory::Aligned;
use crate::simd::{Kernel, Real, Simd};
use crate::statistics::{with_packed, Damped, Packed};
pub(crate) use elimination::{Eliminate, Memory};
use tiles::{invert, products, ROWS};

/// The largest block that is processed here: its square in all lanes lies in a second-level cache.
pub(crate) const LARGEST: usize = 64;

/// Blocks that are processed in one call: a whole number of vectors.
pub(crate) const BLOCKS: usize = 8;

/// `diag(A_b⁻¹)` of blocks of one size, at most [`BLOCKS`], the first of them `b`.
///
/// Returns their sensitivities, `None` for those that are not positive definite.
pub(crate) struct Diagonals<'a> {
    pub damped: Damped<'a>,
    pub b: usize,
    pub size: usize,
    pub memory: &'a mut Aligned<f64>,
    /// `[count, size]`
    pub diagonals: &'a mut [f64],
}

impl Kernel<f64> for Diagonals<'_> {
    type Output = [Option<f64>; BLOCKS];

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) -> [Option<f64>; BLOCKS] {
        let Self { damped, b, size, memory, diagonals } = self;
        let mut found = [None; BLOCKS];
        let parts = diagonals.chunks_mut(S::W * size).zip(found.chunks_mut(S::W));
        for (group, (diagonals, found)) in parts.enumerate() {
            let (first, count) = (b + group * S::W, diagonals.len() / size);
            let mut group = Group::<S>::new(simd, memory, size);
            group.read(damped, first, count);
            group.invert();
            for (lane, found) in found.iter_mut().enumerate().take(count) {
                *found = group.sensitivity(damped, first + lane, lane);
            }
            group.write_diagonals(diagonals);
        }
        found
    }
}

/// Blocks of one size, one in each lane.
struct Group<'a, S: Simd<T = f64>> {
    simd: S,
    /// Rows of the square: a multiple of [`ROWS`], of which those after `size` are of the identity.
    rows: usize,
    /// Vectors from a row to the next: an odd number of them where rows are long, as many rows a power
    /// of two apart would share a few places of a first-level cache.
    stride: usize,
    size: usize,
    /// `[rows, stride, W]`
    square: &'a mut [f64],
    /// `max_i F_ii`, `[W]`
    largest: &'a mut [f64],
    /// Of `A = UᵀU`, `[rows, W]`
    pivots: &'a mut [f64],
    /// `(A⁻¹)_jj`, `[rows, W]`
    diagonal: &'a mut [f64],
}

impl<'a, S: Simd<T = f64>> Group<'a, S> {
    #[inline(always)]
    fn new(simd: S, memory: &'a mut Aligned<f64>, size: usize) -> Self {
        assert!(0 < size && size <= LARGEST && BLOCKS.is_multiple_of(S::W));
        let rows = size.next_multiple_of(ROWS);
        let (w, stride) = (S::W, if rows > 32 { rows | 1 } else { rows });
        let (matrix, row) = (rows * stride * w, rows * w);
        let (square, rest) = memory.room(matrix + 2 * row + w).split_at_mut(matrix);
        let (pivots, rest) = rest.split_at_mut(row);
        let (diagonal, largest) = rest.split_at_mut(row);
        Self { simd, rows, stride, size, square, largest, pivots, diagonal }
    }

    /// Write `A` of `count` blocks, the first of them `b`; the other lanes are those of `b`, too.
    #[inline(always)]
    fn read(&mut self, damped: Damped<'_>, b: usize, count: usize) {
        let lanes = |lane: usize| if lane < count { b + lane } else { b };
        with_packed!(damped.packed(), packed => {
            self.read_from(packed, damped, lanes);
        });
        for i in self.size..self.rows {
            let row = &mut self.square[i * self.stride * S::W..(i + 1) * self.stride * S::W];
            row.fill(0.0);
            row[i * S::W..(i + 1) * S::W].fill(1.0);
        }
        for lane in 0..S::W {
            if let Some(kept) = damped.kept_in(lanes(lane)) {
                self.strike(damped, kept, lane);
            }
        }
    }

    #[inline(always)]
    fn read_from<T: Real>(
        &mut self,
        packed: &[T],
        damped: Damped<'_>,
        lanes: impl Fn(usize) -> usize,
    ) {
        let (w, stride, size) = (S::W, self.stride, self.size);
        let layout = damped.layout();
        let start: [usize; BLOCKS] =
            std::array::from_fn(
                |lane| {
                    if lane < w {
                        layout.packed_range(lanes(lane)).start
                    } else {
                        0
                    }
                },
            );
        let from: [&[T]; BLOCKS] = start.map(|start| &packed[start..start + triangle(size)]);
        let scale = 1.0 / damped.samples();
        // Where weights are pruned, `strike` adds it to the others.
        let damping = if damped.kept_in(0).is_none() { damped.damping() } else { 0.0 };
        self.largest.fill(0.0);
        let mut at = 0;
        for i in 0..size {
            let row = &mut self.square[(i * stride + i) * w..(i + 1) * stride * w];
            for to in row.chunks_exact_mut(w).take(size - i) {
                for lane in 0..w {
                    to[lane] = from[lane][at].into() * scale;
                }
                at += 1;
            }
            row[(size - i) * w..].fill(0.0);
            for (largest, x) in self.largest.iter_mut().zip(row) {
                *largest = largest.max(*x);
                *x += damping;
            }
        }
    }

    /// Replace the rows and columns of pruned weights by those of the identity; damp the others.
    fn strike(&mut self, damped: Damped<'_>, kept: &[bool], lane: usize) {
        let (w, stride, size) = (S::W, self.stride, self.size);
        let mut largest = 0.0f64;
        for i in 0..size {
            if kept[i] {
                let x = &mut self.square[(i * stride + i) * w + lane];
                largest = largest.max(*x);
                *x += damped.damping();
                continue;
            }
            for j in 0..size {
                let (row, column) = (i.min(j), i.max(j));
                self.square[(row * stride + column) * w + lane] = f64::from(u8::from(i == j));
            }
        }
        self.largest[lane] = largest;
    }

    /// Turn the square of `A` into those of `U` and `M`, and add up the diagonal.
    #[inline(always)]
    fn invert(&mut self) {
        self.diagonal.fill(0.0);
        let (w, rows, stride) = (S::W, self.rows, self.stride);
        assert!(self.square.len() == rows * stride * w && self.diagonal.len() == rows * w);
        assert!(self.pivots.len() == rows * w && rows.is_multiple_of(ROWS));
        let _ = self.simd;
        let (square, diagonal) = (self.square.as_mut_ptr(), self.diagonal.as_mut_ptr());
        let pivots = self.pivots.as_mut_ptr();
        // Four vectors of four rows need more than sixteen registers.
        // SAFETY: the assertions make all rows and columns valid; `simd` is the proof of the
        // instruction set.
        unsafe {
            if const { matches!(S::SET, Set::Avx512) } {
                invert::<S, 4>(square, pivots, diagonal, rows, stride);
            } else {
                invert::<S, 2>(square, pivots, diagonal, rows, stride);
            }
        }
    }

    /// Return the sensitivity of a lane; `None` if it is not positive definite.
    #[inline(always)]
    fn sensitivity(&self, damped: Damped<'_>, b: usize, lane: usize) -> Option<f64> {
        let (w, mut is_fine, mut trace) = (S::W, true, 0.0);
        for i in 0..self.size {
            let pivot = self.pivots[i * w + lane];
            is_fine &= pivot > 0.0 && pivot.is_finite();
            trace += self.diagonal[i * w + lane];
        }
        is_fine.then(|| damped.sensitivity(b, self.largest[lane], trace))
    }

    /// Write the diagonals of the first lanes.
    #[inline(always)]
    fn write_diagonals(&self, out: &mut [f64]) {
        for (lane, out) in out.chunks_mut(self.size).enumerate() {
            for (i, out) in out.iter_mut().enumerate() {
                *out = self.diagonal[i * S::W + lane];
            }
        }
    }

    /// Write the lower triangles of the negated inverses of all lanes, row by row,
    /// `[rows (rows + 1) / 2, W]`.
    #[inline(always)]
    fn write_negated_inverses(&self, lower: &mut [f64]) {
        if const { matches!(S::SET, Set::Avx512) } {
            self.write_products::<4>(lower);
        } else {
            self.write_products::<2>(lower);
        }
    }

    /// [`Group::write_negated_inverses`], `C` columns of four rows at a time.
    #[inline(always)]
    fn write_products<const C: usize>(&self, lower: &mut [f64]) {
        let (w, rows, stride) = (S::W, self.rows, self.stride);
        assert!(self.square.len() == rows * stride * w && rows.is_multiple_of(ROWS));
        assert!(lower.len() == triangle(rows) * w && ROWS.is_multiple_of(C));
        let (square, lower, minus) = (self.square.as_ptr(), lower.as_mut_ptr(), -1.0);
        let at = |i: usize, j: usize| square.wrapping_add((i * stride + j) * w);
        for i in (0..rows).step_by(ROWS) {
            for j in (0..i + ROWS).step_by(C) {
                // SAFETY: rows i..rows and the columns of both tiles lie in the square, and of the
                // triangle only its own places are written, by the assertions; `simd` is the proof of the
                // instruction set.
                unsafe {
                    // The columns of `M` begin on the diagonal.
                    let sum = products::<S, C>(at(i, i), at(i, j), rows - i, stride);
                    for r in 0..ROWS {
                        for c in 0..C {
                            if j + c <= i + r {
                                let to = lower.add((triangle(i + r) + j + c) * w);
                                S::store(to, S::mul(S::splat(&raw const minus), sum[r][c]));
                            }
                        }
                    }
                }
            }
        }
    }
}
