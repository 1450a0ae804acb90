//! Exchanges within groups: improve a mask of a pattern one pair of weights at a time.
//!
//! What a mask costs after joint compensation is `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` over all pruned weights `P`
//! of a block, not the sum of what its groups cost alone. Here a pruned weight replaces a kept one of
//! its group while that lowers the cost of the block; the best exchange is made first, and every
//! group keeps its count.
//!
//! With `A` swept on the kept weights `K` (Goodnight 1979; `T_KK = -A_KK⁻¹`, `T_KP = A_KK⁻¹ A_KP`,
//! `T_PP = A_PP - A_PK A_KK⁻¹ A_KP`) and the vector `Aθ` beside it (`w_K` the compensated weights, `w_P`
//! the slope of the loss), restoring `p` saves `w_p² / (2 T_pp)`, and removing `k` then costs
//! `(w_k - T_kp w_p / T_pp)² / (2 (T_kp² / T_pp - T_kk))`: the price of a pair is a few operations, and
//! an exchange is two sweeps.

use crate::parallel::prelude::*;

use crate::error::{check_length, check_weights, Result};
use crate::groups::Groups;
use crate::isa::Isa;
use crate::parallel::{self, checkpoint_at};
use crate::scratch::{room, zeros, Failure, Scratch};
use crate::simd::{dispatch, padded, Kernel, Simd};
use crate::statistics::Damped;

/// The part of a saving that must remain, so that rounding alone exchanges nothing.
const LEAST: f64 = 1e-9;

/// Exchange pruned and kept weights of a group and block until no pair lowers the joint cost.
///
/// Blocks that cannot be factored and weights that were pruned before the statistics were collected
/// are not changed. A group that spans several blocks is exchanged within each of them.
///
/// # Errors
/// [`crate::Error::Length`] for arrays that do not fit, [`crate::Error::NonFiniteWeight`], and
/// [`crate::Error::Memory`].
pub fn refine(
    damped: Damped<'_>,
    weights: &[f32],
    groups: Groups,
    kept: &mut [bool],
) -> Result<()> {
    let (isa, layout) = (Isa::chosen()?, damped.layout());
    check_length("weights", weights.len(), layout.len())?;
    check_length("kept", kept.len(), layout.len())?;
    check_length("shape", groups.len(), layout.len())?;
    check_weights(weights)?;
    let failure = Failure::default();
    parallel::run(|| {
        kept.par_chunks_mut(layout.block())
            .zip(weights.par_chunks(layout.block()))
            .enumerate()
            .for_each_init(Scratch::default, |scratch, (b, (kept, weights))| {
                if failure.check(scratch.reserve(weights.len())) {
                    dispatch(isa, Block { damped, b, weights, groups, kept, scratch });
                }
            });
    });
    failure.or(())
}

struct Block<'a> {
    damped: Damped<'a>,
    b: usize,
    weights: &'a [f32],
    groups: Groups,
    kept: &'a mut [bool],
    scratch: &'a mut Scratch,
}

impl Block<'_> {
    /// Pairs of weights of one group, both in the model.
    fn pairs(&self) -> Vec<(usize, usize)> {
        let (start, size) = (self.b * self.damped.layout().block(), self.kept.len());
        let before = self.damped.kept_in(self.b);
        let there = |j: usize| before.is_none_or(|kept| kept[j]);
        let mut pairs = Vec::new();
        for i in (0..size).filter(|i| there(*i)) {
            let later = self.groups.later(start + i).map(|place| place - start);
            pairs.extend(later.take_while(|j| *j < size).filter(|j| there(*j)).map(|j| (i, j)));
        }
        pairs
    }
}

impl Kernel<f64> for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, _simd: S) {
        let size = self.kept.len();
        let pairs = self.pairs();
        let Self { damped, b, weights, kept, scratch, .. } = self;
        // Without a pair to exchange now there is none later: a group keeps its count in a block.
        if pairs.iter().all(|(i, j)| kept[*i] == kept[*j]) {
            return;
        }
        let stride = padded(size);
        let t = room(&mut scratch.upper, size * stride);
        damped.write(b, t);
        let (w, column) = zeros(&mut scratch.row, 2 * stride).split_at_mut(stride);
        for i in 0..size {
            for j in i..size {
                let entry = t[i * stride + j];
                w[i] += entry * f64::from(weights[j]);
                if j > i {
                    w[j] += entry * f64::from(weights[i]);
                }
            }
        }
        let mut swept = Swept { t, w, column, size, stride };
        if !(0..size).filter(|j| kept[*j]).all(|j| swept.sweep(j, false)) {
            return;
        }
        // Each exchange lowers the cost, so the loop ends; the limit holds against rounding, too.
        for _ in 0..4 * size {
            let mut best = (0.0, None);
            for pair in &pairs {
                let (p, k) = if kept[pair.0] { (pair.1, pair.0) } else { *pair };
                if !kept[p] && kept[k] {
                    let less = swept.saving(p, k);
                    if less > best.0 {
                        best = (less, Some((p, k)));
                    }
                }
            }
            let Some((p, k)) = best.1 else { break };
            if !(swept.sweep(p, false) && swept.sweep(k, true)) {
                break;
            }
            (kept[p], kept[k]) = (true, false);
        }
    }
}

/// `T` (upper triangle by rows, `stride` apart) and `w`; `column` is scratch.
struct Swept<'a> {
    t: &'a mut [f64],
    w: &'a mut [f64],
    column: &'a mut [f64],
    size: usize,
    stride: usize,
}

impl Swept<'_> {
    fn at(&self, i: usize, j: usize) -> f64 {
        self.t[i.min(j) * self.stride + i.max(j)]
    }

    /// By how much the cost falls when `p` is restored and `k` removed; zero where it does not.
    #[inline(always)]
    fn saving(&self, p: usize, k: usize) -> f64 {
        let (pivot, across) = (self.at(p, p), self.at(p, k));
        let saved = self.w[p] * self.w[p] / pivot;
        let left = self.w[k] - across * self.w[p] / pivot;
        let cost = left * left / (across * across / pivot - self.at(k, k));
        if cost < (1.0 - LEAST) * saved {
            (saved - cost) / 2.0
        } else {
            0.0
        }
    }

    /// Sweep on `j`, which joins the kept weights or, with `leaves`, leaves them; false, and nothing
    /// changed, when rounding has left no pivot.
    #[inline(always)]
    fn sweep(&mut self, j: usize, leaves: bool) -> bool {
        let Self { t, w, column, size, stride } = self;
        let (size, stride) = (*size, *stride);
        checkpoint_at(0, size);
        for i in 0..j {
            column[i] = t[i * stride + j];
        }
        column[j..size].copy_from_slice(&t[j * stride + j..j * stride + size]);
        let pivot = column[j];
        let sign = if leaves { -1.0 } else { 1.0 };
        // `!(x > 0)` also catches NaN.
        if !(sign * pivot > 0.0 && pivot.is_finite()) {
            return false;
        }
        let slope = w[j] / pivot;
        for i in 0..size {
            let factor = column[i] / pivot;
            // Whole vectors: entries below the diagonal, or beyond the last column, are not read.
            let from = i & !7;
            let row = &mut t[i * stride + from..(i + 1) * stride];
            for (x, c) in row.iter_mut().zip(&column[from..stride]) {
                *x -= factor * c;
            }
            w[i] -= column[i] * slope;
        }
        let scale = sign / pivot;
        for i in 0..j {
            t[i * stride + j] = column[i] * scale;
        }
        for (x, c) in t[j * stride + j..j * stride + size].iter_mut().zip(&column[j..size]) {
            *x = c * scale;
        }
        t[j * stride + j] = -1.0 / pivot;
        w[j] = sign * slope;
        true
    }
}

#[cfg(test)]
mod tests;
