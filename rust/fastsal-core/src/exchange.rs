//! Exchanges within groups: a mask of a pattern made better, one pair of weights at a time.
//!
//! What a mask costs after joint compensation is `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` over all pruned weights `P`
//! of a block, not the sum of what its groups cost alone. Here a pruned weight comes back for a kept
//! one of its group while that lowers the cost of the block; the best exchange goes first, and every
//! group keeps its count.
//!
//! With `A` swept on the kept weights `K` (Goodnight 1979; `T_KK = -A_KK⁻¹`, `T_KP = A_KK⁻¹ A_KP`,
//! `T_PP = A_PP - A_PK A_KK⁻¹ A_KP`) and the vector `Aθ` beside it (`w_K` the compensated weights, `w_P`
//! the slope of the loss), bringing `p` back saves `w_p² / (2 T_pp)`, and taking `k` out then costs
//! `(w_k - T_kp w_p / T_pp)² / (2 (T_kp² / T_pp - T_kk))`: a pair is priced in a few operations, and
//! exchanged by two sweeps.

use rayon::prelude::*;

use crate::dense::{room, zeros, Scratch};
use crate::error::{check_length, Result};
use crate::factor::{check_damping, Statistics};
use crate::parallel;
use crate::patterns::Groups;
use crate::simd::{dispatch, Isa, Kernel, Real, Simd};
use crate::tiles::padded;

/// The part of a saving that must be left over, so that rounding alone exchanges nothing.
const LEAST: f64 = 1e-9;

/// Exchange pruned and kept weights of a group and block until no pair lowers the joint cost.
///
/// Blocks that cannot be factored stay as they are, and so do weights that were pruned before the
/// statistics (`statistics.kept`). A group that reaches into several blocks is exchanged inside each.
///
/// # Errors
/// [`crate::Error::Length`] and [`crate::Error::Value`] for arguments that do not fit.
pub fn refine<T: Real>(
    statistics: Statistics<'_, T>,
    weights: &[f32],
    groups: Groups,
    damping: f64,
    kept: &mut [bool],
) -> Result<()> {
    statistics.check()?;
    check_damping(damping)?;
    let layout = statistics.layout;
    check_length("weights", weights.len(), layout.len)?;
    check_length("kept", kept.len(), layout.len)?;
    groups.check(layout.len)?;
    let isa = Isa::best();
    parallel::run(|| {
        kept.par_chunks_mut(layout.block)
            .zip(weights.par_chunks(layout.block))
            .enumerate()
            .for_each_init(Scratch::default, |scratch, (b, (kept, weights))| {
                dispatch(isa, Block { statistics, b, weights, groups, damping, kept, scratch });
            });
    });
    Ok(())
}

struct Block<'a, T> {
    statistics: Statistics<'a, T>,
    b: usize,
    weights: &'a [f32],
    groups: Groups,
    damping: f64,
    kept: &'a mut [bool],
    scratch: &'a mut Scratch,
}

impl<T: Real> Block<'_, T> {
    /// Pairs of one group, both in the model.
    fn pairs(&self) -> Vec<(usize, usize)> {
        let (start, size) = (self.b * self.statistics.layout.block, self.kept.len());
        let before = self.statistics.kept_in(self.b);
        let there = |j: usize| before.is_none_or(|kept| kept[j]);
        let mut pairs = Vec::new();
        for i in (0..size).filter(|i| there(*i)) {
            let later = self.groups.later(start + i).map(|place| place - start);
            pairs.extend(later.take_while(|j| *j < size).filter(|j| there(*j)).map(|j| (i, j)));
        }
        pairs
    }
}

impl<T: Real> Kernel<f64> for Block<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self) {
        let size = self.kept.len();
        let pairs = self.pairs();
        let Self { statistics, b, weights, damping, kept, scratch, .. } = self;
        // Without a pair to exchange there will be none later: a group keeps its counts in a block.
        if pairs.iter().all(|(i, j)| kept[*i] == kept[*j]) {
            return;
        }
        let stride = padded(size);
        let t = room(&mut scratch.upper, size * stride);
        statistics.damped(b, damping, t);
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
        // Each exchange lowers the cost, so that there is an end; rounding may not put it off.
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

    /// By how much the cost falls when `p` comes back and `k` goes; zero where it does not.
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

    /// Sweep on `j`, which enters the kept ones or, with `leaves`, leaves them; false, and nothing
    /// done, when rounding has left no pivot.
    #[inline(always)]
    fn sweep(&mut self, j: usize, leaves: bool) -> bool {
        let Self { t, w, column, size, stride } = self;
        let (size, stride) = (*size, *stride);
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
            // Whole vectors: what lies below the diagonal, or beyond the last column, is not read.
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
mod tests {
    use super::*;
    use crate::compensate::compensate;
    use crate::gram::accumulate;
    use crate::rows::Rows;
    use crate::tests::random;
    use crate::Layout;

    #[test]
    fn no_exchange_is_left_that_compensation_would_prefer() {
        for (width, inner, block, m, struck) in [
            (16, 1, 16, 4, 0),
            (6, 3, 10, 4, 0),
            (12, 2, 24, 8, 7),
            (9, 1, 5, 2, 3),
            (7, 1, 64, 4, 0),
        ] {
            let groups = Groups { outer: 2, width, inner, size: m };
            let layout = Layout::new(2 * width * inner, block);
            let (samples, damping) = (40, 1e-2);
            let data = random(5, samples * layout.len);
            let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; layout.len]);
            let rows = Rows::new(&data, samples, layout.len, layout.len).expect("rows");
            accumulate(layout, rows, &mut packed, &mut sums, true).expect("accumulate");
            let mut weights: Vec<f32> = random(6, layout.len).iter().map(|x| *x as f32).collect();
            let there: Vec<bool> = (0..layout.len).map(|j| struck == 0 || j % struck > 0).collect();
            weights.iter_mut().zip(&there).filter(|(_, t)| !**t).for_each(|(w, _)| *w = 0.0);
            let samples = samples as f64;
            let statistics = Statistics { layout, packed: &packed, samples, kept: Some(&there) };
            let cost = |kept: &[bool]| -> f64 {
                let mut moved = weights.clone();
                let report = compensate(statistics, &mut moved, kept, damping).expect("compensate");
                report.increase.iter().sum()
            };
            let half = random(7, layout.len);
            let start: Vec<bool> = half.iter().zip(&there).map(|(x, t)| *t && *x > 0.0).collect();
            let mut kept = start.clone();
            refine(statistics, &weights, groups, damping, &mut kept).expect("refine");
            let least = cost(&kept);
            assert!(least <= cost(&start) && (kept != start || m == 2), "width {width}");
            assert_eq!(kept.iter().filter(|k| **k).count(), start.iter().filter(|k| **k).count());
            assert!(kept.iter().zip(&there).all(|(kept, there)| *there || !kept));
            for i in 0..layout.len {
                for j in groups.later(i).filter(|j| i / block == *j / block) {
                    if there[i] && there[j] && kept[i] != kept[j] {
                        let mut other = kept.clone();
                        other.swap(i, j);
                        assert!(cost(&other) >= least * (1.0 - 1e-9), "{i} {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_that_cannot_be_factored_stay_as_they_are() {
        let layout = Layout::new(8, 8);
        let fine = vec![0.0f64; layout.packed_len()];
        let mut bad = fine.clone();
        bad[0] = -1e3;
        let of = |packed| Statistics { layout, packed, samples: 1.0, kept: None };
        let groups = Groups { outer: 1, width: 8, inner: 1, size: 4 };
        let mut kept = [true, false, true, false, true, false, true, false];
        let (before, weights) = (kept, [1.0, 9.0, 1.0, 9.0, 1.0, 9.0, 1.0, 9.0]);
        refine(of(&bad), &weights, groups, 1.0, &mut kept).expect("refine");
        assert_eq!(kept, before);
        refine(of(&fine), &weights, groups, 1.0, &mut kept).expect("refine");
        assert_eq!(kept, before.map(|k| !k));
        assert!(refine(of(&fine), &weights[1..], groups, 1.0, &mut kept).is_err());
        assert!(refine(of(&fine), &weights, groups, 0.0, &mut kept).is_err());
    }
}
