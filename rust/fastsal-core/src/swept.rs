//! A matrix swept on a set of its rows, of which few entries are read between sweeps.
//!
//! A sweep on `j` subtracts `t_j t_jᵀ / T_jj` from the other rows and columns. The columns are kept
//! apart, as in the elimination of large blocks: only the diagonal and the entries of [`Pair`]s follow
//! each sweep, and a column is brought up to date when it is swept on.

use crate::cholesky::subtract_row;
use crate::memory::Aligned;
use crate::parallel::checkpoint_at;
use crate::simd::Simd;

/// Sweeps whose columns are subtracted from the matrix together.
const STEPS: usize = 16;

/// The part of a saving that must remain, so that rounding alone exchanges nothing.
const LEAST: f64 = 1e-9;

/// Two weights that may be exchanged.
pub(crate) struct Pair {
    pub i: usize,
    pub j: usize,
    /// `T_ij`.
    pub across: f64,
}

impl Pair {
    pub(crate) fn new(i: usize, j: usize) -> Self {
        Self { i, j, across: 0.0 }
    }
}

/// `T` and the vector `w` beside it.
pub(crate) struct Swept<'a> {
    /// `T` in full, as of the last time that columns were subtracted, except on the diagonal. Rows
    /// are `stride` apart, with zeros after the last column.
    t: &'a mut [f64],
    stride: usize,
    w: &'a mut [f64],
    diagonal: &'a mut [f64],
    pairs: &'a mut [Pair],
    /// The columns of the `steps` since then, and the same over their pivots. Rows that were swept on
    /// since are zero: they are up to date in `t`.
    columns: &'a mut [f64],
    scaled: &'a mut [f64],
    steps: usize,
}

impl<'a> Swept<'a> {
    /// Begin with a matrix; `memory` has room for it and one more row.
    pub(crate) fn new(
        t: &'a mut [f64],
        stride: usize,
        w: &'a mut [f64],
        diagonal: &'a mut [f64],
        memory: &'a mut Aligned<f64>,
        pairs: &'a mut [Pair],
    ) -> Self {
        let most = STEPS.min(t.len() / stride / 2).max(1);
        let (columns, scaled) = memory.room(2 * most * stride).split_at_mut(most * stride);
        Self { t, stride, w, diagonal, pairs, columns, scaled, steps: 0 }
    }

    /// Find the pair `(p, k)` such that restoring `p` and removing `k` saves most, if any does.
    #[inline(always)]
    pub(crate) fn best(&self, kept: &[usize]) -> Option<(usize, usize)> {
        let mut best = (0.0, None);
        for pair in &*self.pairs {
            if kept[pair.i] == kept[pair.j] {
                continue;
            }
            let (p, k) = if kept[pair.i] != 0 { (pair.j, pair.i) } else { (pair.i, pair.j) };
            let (w_p, w_k, t) = (self.w[p], self.w[k], pair.across);
            let (t_pp, t_kk) = (self.diagonal[p], self.diagonal[k]);
            let saved = 2.0 * w_k * w_p * t - w_p * w_p * t_kk - w_k * w_k * t_pp;
            let scale = t * t - t_kk * t_pp;
            // Restoring `p` alone saves `w_p² / T_pp`.
            if saved * t_pp > LEAST * w_p * w_p * scale && saved > best.0 * scale {
                best = (saved / scale, Some((p, k)));
            }
        }
        best.1
    }

    /// Sweep on `j`, which joins the kept weights or, with `leaves`, leaves them; false, and nothing
    /// changed, when rounding has left no pivot.
    #[inline(always)]
    pub(crate) fn sweep<S: Simd<T = f64>>(&mut self, simd: S, j: usize, leaves: bool) -> bool {
        let Self { t, stride, w, diagonal, pairs, columns, scaled, steps } = self;
        let (stride, start) = (*stride, *steps * *stride);
        let size = t.len() / stride;
        checkpoint_at(0, size);
        let (pivot, sign) = (diagonal[j], if leaves { -1.0 } else { 1.0 });
        // `!(x > 0)` also catches NaN.
        if !(sign * pivot > 0.0 && pivot.is_finite()) {
            return false;
        }
        let (earlier, column) = columns.split_at_mut(start);
        let column = &mut column[..stride];
        column.copy_from_slice(&t[j * stride..(j + 1) * stride]);
        let factors = &earlier[j.min(earlier.len())..];
        subtract_row(simd, column, scaled, stride, *steps, factors, stride);
        column[j] = 0.0;
        let (over, slope) = (&mut scaled[start..start + stride], w[j] / pivot);
        for i in 0..stride {
            over[i] = column[i] / pivot;
            w[i] -= column[i] * slope;
            diagonal[i] -= column[i] * over[i];
        }
        (w[j], diagonal[j]) = (sign * slope, -1.0 / pivot);
        for pair in &mut **pairs {
            if pair.i == j || pair.j == j {
                // One of the two is zero.
                pair.across = sign * (over[pair.i] + over[pair.j]);
            } else {
                pair.across -= column[pair.i] * over[pair.j];
            }
        }
        for (i, x) in over[..size].iter().enumerate() {
            t[i * stride + j] = sign * x;
            t[j * stride + i] = sign * x;
        }
        for step in 0..*steps {
            columns[step * stride + j] = 0.0;
            scaled[step * stride + j] = 0.0;
        }
        *steps += 1;
        if *steps * stride == columns.len() {
            for (i, row) in t.chunks_mut(stride).enumerate() {
                subtract_row(simd, row, scaled, stride, *steps, &columns[i..], stride);
            }
            *steps = 0;
        }
        true
    }
}
