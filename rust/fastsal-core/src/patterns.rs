//! Groups of weights that are pruned together, N of every M or all of M, by their joint cost.
//!
//! Removing a set `P` of a block at once and moving the others costs `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2`
//! (Optimal Brain Surgeon for several weights; Kurtic et al. 2022, oBERT, eq. 5). The members of a
//! group may belong to two blocks, between which `A⁻¹` is zero.

use crate::parallel::prelude::*;

use crate::error::{check_length, check_weights, Error, Result};
use crate::exchange;
use crate::groups::{Groups, LARGEST_GROUP};
use crate::isa::Isa;
use crate::layout::{row_base, triangle};
use crate::memory::zeros;
use crate::parallel;
use crate::scratch::{Failure, Scratch};
use crate::select::share;
use crate::statistics::{positions, Damped};

/// Keep `n` of every group: those whose complement costs least by itself, then [`exchange::refine`].
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
    let failed = each_alone(damped, weights, groups, n, kept)?;
    exchange::refine(damped, weights, groups, kept)?;
    Ok(failed)
}

/// Keep `n` of every group, those whose complement costs least as if no other group lost any; ties
/// keep the later members. Returns the blocks that could not be factored.
fn each_alone(
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
    for_each_group(damped, weights, groups, kept, |group, g, kept| {
        let out = group.cheapest(group.len - share(group.len, n, groups.size()));
        for (k, at) in groups.members(g).enumerate() {
            kept[at] = out & 1 << k == 0;
        }
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
    for_each_group(damped, weights, groups, costs, |group, g, costs| {
        let cost = group.cost((1 << group.len) - 1) as f32;
        for at in groups.members(g) {
            costs[at] = cost;
        }
    })
}

/// Call `job` with every group, its number in its row, and this row of `out`. Returns the blocks that
/// could not be factored.
fn for_each_group<T: Send>(
    damped: Damped<'_>,
    weights: &[f32],
    groups: Groups,
    out: &mut [T],
    job: impl Fn(&Group, usize, &mut [T]) + Sync + Send,
) -> Result<Vec<usize>> {
    let (table, failed) = neighbors(damped, weights, groups)?;
    let row = groups.row();
    parallel::run(|| {
        out.par_chunks_mut(row.max(1)).enumerate().for_each(|(o, out)| {
            for g in 0..groups.per_row() {
                let group = Group::new(&table, weights, groups, o * row, g);
                job(&group, g, out);
            }
        });
    });
    Ok(failed)
}

/// For each weight, its row of `A⁻¹` among the members of its group: `[d, M]`; and failed blocks.
fn neighbors(
    damped: Damped<'_>,
    weights: &[f32],
    groups: Groups,
) -> Result<(Vec<f64>, Vec<usize>)> {
    let layout = damped.layout();
    check_length("weights", weights.len(), layout.len())?;
    check_length("shape", groups.len(), layout.len())?;
    let (isa, m, row) = (Isa::chosen()?, groups.size(), groups.row());
    check_weights(weights)?;
    let mut table = zeros("the inverses of all groups", layout.len().saturating_mul(m))?;
    let failure = Failure::default();
    let fine: Vec<bool> = parallel::run(|| {
        table
            .par_chunks_mut(layout.block() * m)
            .enumerate()
            .map_init(Scratch::default, |scratch, (b, table)| {
                let has_room = failure.check(scratch.reserve(layout.size(b)));
                if !has_room || damped.invert(isa, b, scratch).is_none() {
                    table.fill(f64::NAN);
                    return false;
                }
                let (start, size) = (layout.range(b).start, layout.size(b));
                let inverse = &scratch.packed[..triangle(size)];
                for i in 0..size {
                    let place = start + i;
                    let base = place / row * row;
                    let first = groups.first(place - base);
                    for k in 0..m {
                        // Entries of members in other blocks remain zero.
                        let other = base + first + k * groups.step();
                        if let Some(j) = other.checked_sub(start).filter(|j| *j < size) {
                            table[i * m + k] = inverse[row_base(size, i.min(j)) + i.max(j)];
                        }
                    }
                }
                true
            })
            .collect()
    });
    failure.or((table, positions(&fine, |fine| !fine)))
}

/// One group: its weights and their part of `A⁻¹`.
struct Group {
    len: usize,
    theta: [f64; LARGEST_GROUP],
    inverse: [[f64; LARGEST_GROUP]; LARGEST_GROUP],
}

impl Group {
    fn new(table: &[f64], weights: &[f32], groups: Groups, row: usize, g: usize) -> Self {
        let mut group = Self {
            len: 0,
            theta: [0.0; LARGEST_GROUP],
            inverse: [[0.0; LARGEST_GROUP]; LARGEST_GROUP],
        };
        for at in groups.members(g) {
            let at = row + at;
            group.theta[group.len] = f64::from(weights[at]);
            group.inverse[group.len][..groups.size()]
                .copy_from_slice(&table[at * groups.size()..(at + 1) * groups.size()]);
            group.len += 1;
        }
        group
    }

    /// Compute `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` by a Cholesky factorization of `[A⁻¹]_PP`; `P` as bits.
    fn cost(&self, out: usize) -> f64 {
        let mut factor = [[0.0f64; LARGEST_GROUP]; LARGEST_GROUP];
        let mut solved = [0.0f64; LARGEST_GROUP];
        let mut cost = 0.0;
        let members = |end: usize| (0..end).filter(|i| out & 1 << i != 0).enumerate();
        for (row, i) in members(self.len) {
            let mut value = self.theta[i];
            let mut pivot = self.inverse[i][i];
            for (column, j) in members(i) {
                let known: f64 = (0..column).map(|k| factor[row][k] * factor[column][k]).sum();
                let entry = (self.inverse[i][j] - known) / factor[column][column];
                factor[row][column] = entry;
                value -= entry * solved[column];
                pivot -= entry * entry;
            }
            let root = pivot.max(f64::MIN_POSITIVE).sqrt();
            factor[row][row] = root;
            solved[row] = value / root;
            cost += solved[row] * solved[row];
        }
        cost / 2.0
    }

    /// Find the set of `count` members that costs least, as bits; the earliest members among equals.
    fn cheapest(&self, count: usize) -> usize {
        let mut best = (f64::INFINITY, (1 << count) - 1);
        for out in 0..1usize << self.len {
            if out.count_ones() as usize == count {
                let cost = self.cost(out);
                if cost < best.0 {
                    best = (cost, out);
                }
            }
        }
        best.1
    }
}

#[cfg(test)]
mod tests;
