//! Exchanges within groups: improve a mask of a pattern one pair of weights at a time.
//!
//! What a mask costs after joint compensation is `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` over all pruned weights `P`
//! of a block, not the sum of what its groups cost alone. Here a pruned weight replaces a kept one of
//! its group while that lowers the cost of the block; the best exchange is made first, and every
//! group keeps its count.
//!
//! With `A` swept on the kept weights `K` (Goodnight 1979; `T_KK = -A_KK⁻¹`, `T_KP = A_KK⁻¹ A_KP`,
//! `T_PP = A_PP - A_PK A_KK⁻¹ A_KP`) and the vector `Aθ` beside it (`w_K` the compensated weights, `w_P`
//! the slope of the loss), to restore `p` and remove `k` saves half of
//! `(2 w_k w_p T_kp - w_p² T_kk - w_k² T_pp) / (T_kp² - T_kk T_pp)`: the price of a pair is a few operations,
//! and an exchange is two sweeps ([`Swept`]).
//!
//! `T` comes from one product: with `A_KK = UᵀU`, `M = U⁻ᵀ` and `W = M A_KP`, the Gram matrix of
//! `[M W]` is `[-T_KK, T_KP; T_PK, A_PP - T_PP]`.

use crate::parallel::prelude::*;

use crate::cholesky::{cholesky_rows, invert_factor};
use crate::error::{check_length, check_weights, Result};
use crate::groups::Groups;
use crate::isa::Isa;
use crate::layout::{row_base, triangle};
use crate::memory::Aligned;
use crate::panels::Panels;
use crate::parallel;
use crate::scratch::{Failure, Scratch};
use crate::simd::{dispatch, padded, Kernel, Simd};
use crate::statistics::Damped;
use crate::swept::{Pair, Swept};
use crate::syrk::syrk_of_lower_and_rest;

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
            .for_each_init(Workspace::default, |workspace, (b, (kept, weights))| {
                if failure.check(workspace.scratch.reserve(weights.len(), layout.blocks())) {
                    refine_block(isa, damped, b, weights, groups, kept, workspace);
                }
            });
    });
    failure.or(())
}

/// [`refine`] for one block.
pub(crate) fn refine_block(
    isa: Isa,
    damped: Damped<'_>,
    b: usize,
    weights: &[f32],
    groups: Groups,
    kept: &mut [bool],
    workspace: &mut Workspace,
) {
    dispatch(isa, Block { damped, b, weights, groups, kept, workspace });
}

/// A worker's memory.
#[derive(Default)]
pub(crate) struct Workspace {
    pub scratch: Scratch,
    /// Weights in the order of `T`: the kept ones, then the pruned ones.
    order: Vec<usize>,
    /// Their places in this order.
    place: Vec<usize>,
    pairs: Vec<Pair>,
}

/// The matrices of [`sweep_kept`].
type Matrices<'a> =
    (&'a mut Aligned<f64>, &'a mut Aligned<f64>, &'a mut Aligned<f64>, &'a mut Panels);

struct Block<'a> {
    damped: Damped<'a>,
    b: usize,
    weights: &'a [f32],
    groups: Groups,
    kept: &'a mut [bool],
    workspace: &'a mut Workspace,
}

impl Block<'_> {
    /// Write the order of the weights of the model, and the pairs of weights of one group; return the
    /// number of kept weights, or `None` if there is nothing to exchange.
    fn begin(&mut self) -> Option<usize> {
        let Self { damped, b, groups, kept, workspace, .. } = self;
        let Workspace { order, place, pairs, .. } = &mut **workspace;
        let (start, size) = (*b * damped.layout().block(), kept.len());
        let before = damped.kept_in(*b);
        let there = |j: usize| before.is_none_or(|kept| kept[j]);
        order.clear();
        order.extend((0..size).filter(|j| kept[*j] && there(*j)));
        let count = order.len();
        order.extend((0..size).filter(|j| !kept[*j] && there(*j)));
        place.clear();
        place.resize(size, 0);
        for (at, j) in order.iter().enumerate() {
            place[*j] = at;
        }
        pairs.clear();
        for i in (0..size).filter(|i| there(*i)) {
            let later = groups.later(start + i).map(|place| place - start);
            let later = later.take_while(|j| *j < size).filter(|j| there(*j));
            pairs.extend(later.map(|j| Pair::new(place[i], place[j])));
        }
        // Without a pair to exchange now there is none later: a group keeps its count in a block.
        let differ = |pair: &Pair| (pair.i < count) != (pair.j < count);
        pairs.iter().any(differ).then_some(count)
    }
}

impl Kernel<f64> for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = f64>>(mut self, simd: S) {
        let Some(count) = self.begin() else { return };
        let Self { damped, b, weights, kept, workspace, .. } = self;
        let Workspace { scratch, order, place, pairs } = workspace;
        let Scratch { upper, lower, row, packed, panels, .. } = scratch;
        let (size, stride) = (order.len(), padded(order.len()));
        if !sweep_kept(simd, damped, b, order, place, count, (upper, lower, packed, panels)) {
            return;
        }
        let t = &mut lower[..size * stride];
        let (w, diagonal) = row.zeros(2 * stride).split_at_mut(stride);
        for (i, j) in order.iter().enumerate() {
            diagonal[i] = t[i * stride + i];
            let theta = f64::from(weights[*j]);
            if i < count {
                w[i] = theta;
                continue;
            }
            for (w, x) in w[..size].iter_mut().zip(&t[i * stride..]) {
                *w += x * theta;
            }
        }
        for pair in &mut *pairs {
            pair.across = t[pair.i * stride + pair.j];
        }
        // `place` is no longer needed: it says which weights are kept.
        place.clear();
        place.extend((0..size).map(|i| usize::from(i < count)));
        let mut swept = Swept::new(t, stride, w, diagonal, upper, pairs);
        // Each exchange lowers the cost, so the loop ends; the limit holds against rounding, too.
        for _ in 0..4 * kept.len() {
            let Some((p, k)) = swept.best(place) else { break };
            if !(swept.sweep(simd, p, false) && swept.sweep(simd, k, true)) {
                break;
            }
            (place[p], place[k]) = (1, 0);
            (kept[order[p]], kept[order[k]]) = (true, false);
        }
    }
}

/// Write `T`, in full, to the second matrix; false when `A_KK` is not positive definite.
#[inline(always)]
fn sweep_kept<S: Simd<T = f64>>(
    simd: S,
    damped: Damped<'_>,
    b: usize,
    order: &[usize],
    place: &[usize],
    count: usize,
    (upper, lower, packed, panels): Matrices<'_>,
) -> bool {
    let (size, stride) = (order.len(), padded(order.len()));
    let all = damped.layout().size(b);
    let from = upper.room(all * padded(all));
    damped.write(b, from);
    let a = lower.room(size * stride);
    let (kept, pruned) = order.split_at(count);
    for (at, i) in order.iter().enumerate() {
        let row = &from[i * padded(all)..i * padded(all) + all];
        // Each list is ascending: the rest of a list is right of the diagonal.
        let first = pruned.partition_point(|j| j < i);
        let rest = if at < count { &kept[at..] } else { &[] };
        for (to, j) in a[at * stride + at..].iter_mut().zip(rest) {
            *to = row[*j];
        }
        let to = &mut a[at * stride + count + first..];
        for (to, j) in to.iter_mut().zip(&pruned[first..]) {
            *to = row[*j];
        }
        if at >= count {
            let first = kept.partition_point(|j| j < i);
            for j in &kept[first..] {
                a[place[*j] * stride + at] = row[*j];
            }
        }
    }
    if !cholesky_rows(simd.isa(), a, size, count, panels) {
        return false;
    }
    let panel = upper.room(size * stride);
    invert_factor(simd.isa(), a, panel, count, stride, panels);
    for (to, from) in panel.chunks_mut(stride).zip(a.chunks(stride)).take(count) {
        to[count..size].copy_from_slice(&from[count..size]);
    }
    let packed = packed.room(triangle(size));
    packed[..row_base(size, count) + count].fill(0.0);
    for i in count..size {
        let to = &mut packed[row_base(size, i) + i..row_base(size, i) + size];
        for (to, x) in to.iter_mut().zip(&a[i * stride + i..]) {
            *to = -x;
        }
    }
    syrk_of_lower_and_rest(simd.isa(), panel, count, size, stride, packed);
    for i in 0..size {
        let base = row_base(size, i);
        for j in i..size {
            let x = packed[base + j];
            let x = if i < count && j >= count { x } else { -x };
            a[i * stride + j] = x;
            a[j * stride + i] = x;
        }
        a[i * stride + size..(i + 1) * stride].fill(0.0);
    }
    true
}

#[cfg(test)]
mod tests;
