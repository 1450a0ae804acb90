//! Groups of weights that are pruned together, N of every M or all of M, by their joint cost.
//!
//! Removing a set `P` of a block at once and moving the others costs `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2`
//! (Optimal Brain Surgeon for several weights; Kurtic et al. 2022, oBERT, eq. 5). The members of a
//! group may belong to two blocks, between which `A⁻¹` is zero. Of `A⁻¹` only the entries between members
//! of one group are formed, for a few rows of a parameter at a time.

use crate::parallel::prelude::*;

use crate::error::{check_length, check_weights, Error, Result};
use crate::exchange::{refine_block, Workspace};
use crate::group_costs::{Batches, Cheapest, Whole};
use crate::groups::Groups;
use crate::isa::Isa;
use crate::memory::Aligned;
use crate::parallel::{self, checkpoint};
use crate::scratch::{Failure, Scratch};
use crate::select::share;
use crate::simd::{dispatch, padded, Kernel, Simd};
use crate::statistics::Damped;

/// Least number of weights that a worker processes at a time.
const WINDOW: usize = 1024;

/// Keep `n` of every group: those whose complement costs least by itself, then
/// [`refine`](crate::exchange::refine).
///
/// A short last group of `r` members keeps `ceil(r n / M)`. Returns the blocks that could not be
/// factored; groups that reach into them lose their first members.
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit, [`Error::NonFiniteWeight`],
/// and [`Error::Memory`].
pub fn n_of_m(
    damped: Damped<'_>,
    weights: &[f32],
    groups: Groups,
    n: usize,
    kept: &mut [bool],
) -> Result<Vec<usize>> {
    check_length("kept", kept.len(), weights.len())?;
    if n > groups.size() {
        let got = format!("{n}:{}", groups.size());
        return Err(Error::Value { what: "pattern", got, expected: "N:M with N <= M" });
    }
    for_each_window(damped, weights, groups, kept, |window, workspace, kept| {
        window.choose(n, kept);
        window.refine(kept, workspace);
    })
}

/// Write the joint cost of each whole group at each of its members.
///
/// Returns the blocks that could not be factored; their costs are NaN.
///
/// # Errors
/// [`Error::Length`] for arrays that do not fit, [`Error::NonFiniteWeight`], and [`Error::Memory`].
pub fn group_costs(
    damped: Damped<'_>,
    weights: &[f32],
    groups: Groups,
    costs: &mut [f32],
) -> Result<Vec<usize>> {
    check_length("costs", costs.len(), weights.len())?;
    for_each_window(damped, weights, groups, costs, |window, _, costs| window.price(costs))
}

/// Call `job` with every window and its part of `out`. Returns the blocks that could not be factored.
fn for_each_window<T: Send>(
    damped: Damped<'_>,
    weights: &[f32],
    groups: Groups,
    out: &mut [T],
    job: impl Fn(&Window<'_>, &mut Workspace, &mut [T]) + Sync + Send,
) -> Result<Vec<usize>> {
    let layout = damped.layout();
    check_length("weights", weights.len(), layout.len())?;
    check_length("shape", groups.len(), layout.len())?;
    let isa = Isa::chosen()?;
    check_weights(weights)?;
    let len = window_len(groups, layout.block());
    let windows = layout.len().div_ceil(len.max(1));
    let failure = Failure::default();
    let failed: Vec<Vec<usize>> = parallel::run(|| {
        out.par_chunks_mut(len)
            .zip(weights.par_chunks(len))
            .enumerate()
            .map_init(
                || (Workspace::default(), Aligned::default()),
                |(workspace, table), (i, (out, weights))| {
                    let first = i * len / layout.block();
                    let failed = Vec::new();
                    let mut window = Window { isa, damped, groups, weights, first, failed, table };
                    if failure.check(window.factor(&mut workspace.scratch, windows)) {
                        job(&window, workspace, out);
                    }
                    window.failed
                },
            )
            .collect()
    });
    failure.or(failed.into_iter().flatten().collect())
}

/// Length of windows that neither a block nor a group leaves; of the parameter where there are none.
fn window_len(groups: Groups, block: usize) -> usize {
    let row = groups.row().max(1);
    let (mut divisor, mut rest) = (row, block);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    let least = row.saturating_mul(block / divisor);
    least.saturating_mul(WINDOW.div_ceil(least)).min(groups.len().max(1))
}

/// A part of a parameter that neither a block nor a group leaves.
struct Window<'a> {
    isa: Isa,
    damped: Damped<'a>,
    groups: Groups,
    weights: &'a [f32],
    /// The first block.
    first: usize,
    /// Blocks that cannot be factored.
    failed: Vec<usize>,
    /// `[M, len]`: `(A⁻¹)_jj`, then the entry of `j` and the next member of its group, then that of `j`
    /// and the one after, and so on. Entries between two blocks are zero.
    table: &'a mut Aligned<f64>,
}

impl Window<'_> {
    /// Factor the blocks and fill the table; `windows` are processed at the same time.
    fn factor(&mut self, scratch: &mut Scratch, windows: usize) -> Result<()> {
        let Self { isa, damped, groups, weights, first, .. } = *self;
        let len = weights.len();
        let entries = groups.size().saturating_mul(len);
        self.table.reserve("the inverses of the groups", entries)?;
        let table = self.table.room(entries);
        for (k, start) in (0..len).step_by(damped.layout().block()).enumerate() {
            checkpoint();
            let b = first + k;
            scratch.reserve(damped.layout().size(b), windows)?;
            if !dispatch(isa, Bands { damped, b, groups, scratch, table, start, len }) {
                self.failed.push(b);
            }
        }
        Ok(())
    }

    /// Keep `n` of every group, those whose complement costs least as if no other group lost any;
    /// ties keep the later members.
    fn choose(&self, n: usize, kept: &mut [bool]) {
        let Self { isa, groups, weights, .. } = *self;
        for batch in Batches::new(groups, weights, self.table) {
            let count = batch.len - share(batch.len, n, groups.size());
            let out = dispatch(isa, Cheapest { batch: &batch, count });
            for (first, out) in batch.first().iter().zip(out) {
                for k in 0..batch.len {
                    kept[first + k * groups.step()] = out & 1 << k == 0;
                }
            }
        }
    }

    /// Write the cost of each whole group at each of its members.
    fn price(&self, costs: &mut [f32]) {
        let Self { isa, groups, weights, .. } = *self;
        for batch in Batches::new(groups, weights, self.table) {
            let found = dispatch(isa, Whole { batch: &batch });
            for (first, cost) in batch.first().iter().zip(found) {
                for k in 0..batch.len {
                    costs[first + k * groups.step()] = cost as f32;
                }
            }
        }
    }

    /// Exchange weights in every block.
    fn refine(&self, kept: &mut [bool], workspace: &mut Workspace) {
        let Self { isa, damped, groups, weights, first, .. } = *self;
        let block = damped.layout().block();
        for (k, (kept, weights)) in kept.chunks_mut(block).zip(weights.chunks(block)).enumerate() {
            checkpoint();
            if self.failed.binary_search(&(first + k)).is_err() {
                refine_block(isa, damped, first + k, weights, groups, kept, workspace);
            }
        }
    }
}

/// The part of one block in the table of a window: the sums of products of the columns of `M`, where
/// `A⁻¹ = MᵀM`. False, and all NaN, where `A` is not positive definite.
struct Bands<'a> {
    damped: Damped<'a>,
    b: usize,
    groups: Groups,
    scratch: &'a mut Scratch,
    table: &'a mut [f64],
    /// Place of the block in the window.
    start: usize,
    /// Length of the window.
    len: usize,
}

impl Kernel<f64> for Bands<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) -> bool {
        let Self { damped, b, groups, scratch, table, start, len } = self;
        let size = damped.layout().size(b);
        let is_fine = damped.factor(simd.isa(), b, scratch).is_some();
        let stride = padded(size);
        for (k, band) in table.chunks_mut(len).take(groups.size()).enumerate() {
            let (band, shift) = (&mut band[start..start + size], k.saturating_mul(groups.step()));
            if !is_fine {
                band.fill(f64::NAN);
                continue;
            }
            band.fill(0.0);
            for (i, row) in scratch.lower.chunks(stride).take(size).enumerate() {
                let n = (i + 1).saturating_sub(shift);
                let later = &row[shift.min(stride)..];
                for ((sum, x), y) in band[..n].iter_mut().zip(row).zip(later) {
                    *sum += x * y;
                }
            }
        }
        is_fine
    }
}

#[cfg(test)]
mod tests;
