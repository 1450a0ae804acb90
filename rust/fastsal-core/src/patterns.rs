//! Groups of weights that stay or go together: N of every M, or all of M, by their joint cost.
//!
//! Removing a set `P` of a block at once and moving the others costs `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2`
//! (Optimal Brain Surgeon for several weights; Kurtic et al. 2022, oBERT, eq. 5). Groups lie along
//! the input axis of a parameter `[outer, width, inner]`, so that their members are `inner` apart in
//! memory and may belong to two blocks, between which `A⁻¹` is zero.

use rayon::prelude::*;

use crate::dense::Scratch;
use crate::error::{check_length, Error, Result};
use crate::exchange;
use crate::factor::{check_damping, Statistics};
use crate::layout::{row_base, triangle};
use crate::parallel;
use crate::simd::{Isa, Real};

/// The largest group: every choice of its members is tried.
pub const LARGEST: usize = 8;

/// A parameter `[outer, width, inner]` and its groups of `size` along the middle axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Rows: output channels.
    pub outer: usize,
    /// The axis that is cut: input channels.
    pub width: usize,
    /// What lies between two neighbours: kernel positions.
    pub inner: usize,
    /// Members of a group, `M`; the last of a row may be short.
    pub size: usize,
}

impl Groups {
    pub(crate) fn check(&self, len: usize) -> Result<()> {
        check_length("shape", self.outer * self.width * self.inner, len)?;
        if self.size == 0 || self.size > LARGEST {
            let got = self.size.to_string();
            return Err(Error::Value { what: "group", got, expected: "1 to 8 members" });
        }
        Ok(())
    }

    /// Groups of one row.
    fn per_row(&self) -> usize {
        self.width.div_ceil(self.size) * self.inner
    }

    /// The members of group `g` of a row, as places in the row.
    fn members(&self, g: usize) -> impl Iterator<Item = usize> + Clone {
        let (inner, first) = (self.inner, g / self.inner * self.size);
        let last = self.width.min(first + self.size);
        let at = g % inner;
        (first..last).map(move |w| w * inner + at)
    }

    /// Places in the parameter of the later members of the group of the weight at `place`.
    pub(crate) fn later(&self, place: usize) -> impl Iterator<Item = usize> {
        let w = place / self.inner % self.width;
        let left = self.width.min((w / self.size + 1) * self.size) - w;
        let inner = self.inner;
        (1..left).map(move |k| place + k * inner)
    }

    /// Where the first member of the group of the weight at place `at` of a row lies.
    fn first(&self, at: usize) -> usize {
        let (w, i) = (at / self.inner, at % self.inner);
        w / self.size * self.size * self.inner + i
    }
}

/// Keep `n` of every group: those whose complement costs least by itself, then [`exchange::refine`].
///
/// A short last group of `r` members keeps `ceil(r n / M)`. Returns the blocks that could not be
/// factored; groups that reach into them lose their first members.
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit.
pub fn n_of_m<T: Real>(
    statistics: Statistics<'_, T>,
    weights: &[f32],
    groups: Groups,
    n: usize,
    damping: f64,
    kept: &mut [bool],
) -> Result<Vec<usize>> {
    let failed = each_alone(statistics, weights, groups, n, damping, kept)?;
    exchange::refine(statistics, weights, groups, damping, kept)?;
    Ok(failed)
}

/// Keep `n` of every group, those whose complement costs least as if no other group lost any; ties
/// keep the later members. Returns the blocks that could not be factored.
fn each_alone<T: Real>(
    statistics: Statistics<'_, T>,
    weights: &[f32],
    groups: Groups,
    n: usize,
    damping: f64,
    kept: &mut [bool],
) -> Result<Vec<usize>> {
    check_length("kept", kept.len(), weights.len())?;
    if n > groups.size {
        let got = format!("{n}:{}", groups.size);
        return Err(Error::Value { what: "pattern", got, expected: "N:M with N <= M" });
    }
    let (table, failed) = neighbours(statistics, weights, groups, damping)?;
    let row = groups.width * groups.inner;
    parallel::run(|| {
        kept.par_chunks_mut(row.max(1)).enumerate().for_each(|(o, kept)| {
            for g in 0..groups.per_row() {
                let group = Group::new(&table, weights, groups, o * row, g);
                let out = group.cheapest(group.len - (group.len * n).div_ceil(groups.size));
                for (k, at) in groups.members(g).enumerate() {
                    kept[at] = out & 1 << k == 0;
                }
            }
        });
    });
    Ok(failed)
}

/// The joint cost of each whole group, written at each of its members.
///
/// Returns the blocks that could not be factored; their costs are NaN.
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit.
pub fn group_costs<T: Real>(
    statistics: Statistics<'_, T>,
    weights: &[f32],
    groups: Groups,
    damping: f64,
    costs: &mut [f32],
) -> Result<Vec<usize>> {
    check_length("costs", costs.len(), weights.len())?;
    let (table, failed) = neighbours(statistics, weights, groups, damping)?;
    let row = groups.width * groups.inner;
    parallel::run(|| {
        costs.par_chunks_mut(row.max(1)).enumerate().for_each(|(o, costs)| {
            for g in 0..groups.per_row() {
                let group = Group::new(&table, weights, groups, o * row, g);
                let cost = group.cost((1 << group.len) - 1) as f32;
                for at in groups.members(g) {
                    costs[at] = cost;
                }
            }
        });
    });
    Ok(failed)
}

/// For each weight, its row of `A⁻¹` among the members of its group: `[d, M]`; and failed blocks.
fn neighbours<T: Real>(
    statistics: Statistics<'_, T>,
    weights: &[f32],
    groups: Groups,
    damping: f64,
) -> Result<(Vec<f64>, Vec<usize>)> {
    statistics.check()?;
    check_damping(damping)?;
    let layout = statistics.layout;
    check_length("weights", weights.len(), layout.len)?;
    groups.check(layout.len)?;
    let (isa, m, row) = (Isa::best(), groups.size, groups.width * groups.inner);
    let mut table = vec![0.0; layout.len * m];
    let fine: Vec<bool> = parallel::run(|| {
        table
            .par_chunks_mut(layout.block * m)
            .enumerate()
            .map_init(Scratch::default, |scratch, (b, table)| {
                let (start, size) = (b * layout.block, layout.size(b));
                if statistics.inverse_of(isa, b, damping, scratch).is_none() {
                    table.fill(f64::NAN);
                    return false;
                }
                let inverse = &scratch.packed[..triangle(size)];
                for i in 0..size {
                    let place = start + i;
                    let base = place / row * row;
                    let first = groups.first(place - base);
                    for k in 0..m {
                        // Members in other blocks stay at zero.
                        let other = base + first + k * groups.inner;
                        if let Some(j) = other.checked_sub(start).filter(|j| *j < size) {
                            table[i * m + k] = inverse[row_base(size, i.min(j)) + i.max(j)];
                        }
                    }
                }
                true
            })
            .collect()
    });
    let failed = fine.iter().enumerate().filter(|(_, fine)| !**fine).map(|(b, _)| b).collect();
    Ok((table, failed))
}

/// One group: its weights and their part of `A⁻¹`.
struct Group {
    len: usize,
    theta: [f64; LARGEST],
    inverse: [[f64; LARGEST]; LARGEST],
}

impl Group {
    fn new(table: &[f64], weights: &[f32], groups: Groups, row: usize, g: usize) -> Self {
        let mut group = Self { len: 0, theta: [0.0; LARGEST], inverse: [[0.0; LARGEST]; LARGEST] };
        for at in groups.members(g) {
            let at = row + at;
            group.theta[group.len] = f64::from(weights[at]);
            group.inverse[group.len][..groups.size]
                .copy_from_slice(&table[at * groups.size..(at + 1) * groups.size]);
            group.len += 1;
        }
        group
    }

    /// `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` by a Cholesky factorisation of `[A⁻¹]_PP`; `P` as bits.
    fn cost(&self, out: usize) -> f64 {
        let mut factor = [[0.0f64; LARGEST]; LARGEST];
        let mut solved = [0.0f64; LARGEST];
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

    /// The set of `count` members that costs least, as bits; the earliest members among equals.
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
mod tests {
    use super::*;
    use crate::factor::inverse;
    use crate::gram::accumulate;
    use crate::rows::Rows;
    use crate::tests::random;
    use crate::Layout;

    /// `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` by Gaussian elimination, over the dense inverse of all blocks.
    fn slow_cost(dense: &[Vec<f64>], theta: &[f64], out: &[usize]) -> f64 {
        let n = out.len();
        let mut a: Vec<Vec<f64>> = out
            .iter()
            .map(|i| out.iter().map(|j| dense[*i][*j]).chain([theta[*i]]).collect())
            .collect();
        for c in 0..n {
            for r in c + 1..n {
                let f = a[r][c] / a[c][c];
                let above = a[c].clone();
                for (x, y) in a[r].iter_mut().zip(&above).skip(c) {
                    *x -= f * y;
                }
            }
        }
        let mut x = vec![0.0; n];
        for r in (0..n).rev() {
            let known: f64 = (r + 1..n).map(|k| a[r][k] * x[k]).sum();
            x[r] = (a[r][n] - known) / a[r][r];
        }
        out.iter().zip(&x).map(|(i, x)| theta[*i] * x).sum::<f64>() / 2.0
    }

    #[test]
    fn the_cheapest_choice_of_each_group_alone_stays_out() {
        for (outer, width, inner, block, m, n) in
            [(3, 8, 1, 8, 4, 2), (2, 10, 3, 7, 4, 2), (4, 6, 9, 64, 4, 1), (1, 17, 2, 16, 8, 4)]
        {
            let layout = Layout::new(outer * width * inner, block);
            let groups = Groups { outer, width, inner, size: m };
            let (samples, damping) = (30, 1e-2);
            let data = random(5, samples * layout.len);
            let theta = random(6, layout.len);
            let weights: Vec<f32> = theta.iter().map(|x| *x as f32).collect();
            let theta: Vec<f64> = weights.iter().map(|x| f64::from(*x)).collect();
            let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; layout.len]);
            let rows = Rows::new(&data, samples, layout.len, layout.len).expect("rows");
            accumulate(layout, rows, &mut packed, &mut sums, true).expect("accumulate");
            let statistics =
                Statistics { layout, packed: &packed, samples: samples as f64, kept: None };
            let mut full = vec![0.0; layout.blocks() * layout.block * layout.block];
            inverse(statistics, damping, &mut full).expect("inverse");
            let mut dense = vec![vec![0.0; layout.len]; layout.len];
            for i in 0..layout.len {
                for j in 0..layout.len {
                    let (b, size) = (i / layout.block, layout.block);
                    if j / size == b {
                        dense[i][j] = full[(b * size + i % size) * size + j % size];
                    }
                }
            }
            let mut kept = vec![false; layout.len];
            assert!(each_alone(statistics, &weights, groups, n, damping, &mut kept)
                .expect("n of m")
                .is_empty());
            let mut costs = vec![0.0; layout.len];
            group_costs(statistics, &weights, groups, damping, &mut costs).expect("costs");
            for o in 0..outer {
                for first in (0..width).step_by(m) {
                    for i in 0..inner {
                        let members: Vec<usize> = (first..width.min(first + m))
                            .map(|w| (o * width + w) * inner + i)
                            .collect();
                        let stay = (members.len() * n).div_ceil(m);
                        let choose = |bits: usize| -> Vec<usize> {
                            let chosen = members.iter().enumerate();
                            chosen.filter(|(k, _)| bits & 1 << k != 0).map(|(_, j)| *j).collect()
                        };
                        let least = (0..1usize << members.len())
                            .filter(|b| b.count_ones() as usize == members.len() - stay)
                            .map(|bits| slow_cost(&dense, &theta, &choose(bits)))
                            .fold(f64::INFINITY, f64::min);
                        let out: Vec<usize> =
                            members.iter().copied().filter(|j| !kept[*j]).collect();
                        assert_eq!(out.len(), members.len() - stay);
                        let found = slow_cost(&dense, &theta, &out);
                        assert!((found - least).abs() <= 1e-9 * least.max(1e-12));
                        let whole = slow_cost(&dense, &theta, &members);
                        for j in &members {
                            assert!((f64::from(costs[*j]) / whole - 1.0).abs() < 1e-5);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn bad_arguments_are_refused() {
        let layout = Layout::new(12, 4);
        let packed = vec![0.0f64; layout.packed_len()];
        let statistics = Statistics { layout, packed: &packed, samples: 1.0, kept: None };
        let weights = [1.0f32; 12];
        let mut kept = [false; 12];
        let mut run = |width, size, n| {
            let groups = Groups { outer: 1, width, inner: 1, size };
            n_of_m(statistics, &weights, groups, n, 1.0, &mut kept)
        };
        assert!(run(12, 4, 2).is_ok());
        assert!(run(11, 4, 2).is_err() && run(12, 9, 2).is_err() && run(12, 4, 5).is_err());
        assert!(run(12, 0, 0).is_err());
    }
}
