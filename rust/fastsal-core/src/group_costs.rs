//! The costs of the members of groups, many groups at a time: one in each lane.

// Loops over members index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use crate::groups::{Groups, LARGEST_GROUP};
use crate::simd::{Kernel, Simd};

/// Groups of a batch.
const LANES: usize = 8;

/// A number for each group.
type Lanes = [f64; LANES];

/// Groups with the same number of members.
pub(crate) struct Batch {
    /// Number of members of each.
    pub len: usize,
    /// The first members, and how many groups there are.
    first: [usize; LANES],
    count: usize,
    theta: [Lanes; LARGEST_GROUP],
    /// `[A⁻¹]_ij`, `j <= i`; lanes without a group have the identity.
    inverse: [[Lanes; LARGEST_GROUP]; LARGEST_GROUP],
}

impl Batch {
    /// Places of the first members.
    pub(crate) fn first(&self) -> &[usize] {
        &self.first[..self.count]
    }
}

/// All groups of whole rows.
pub(crate) struct Batches<'a> {
    groups: Groups,
    weights: &'a [f32],
    /// `[M, d]`: entries of `A⁻¹` of each weight and the member that many later in its group.
    table: &'a [f64],
    /// The row and the group in it that come next.
    row: usize,
    group: usize,
}

impl<'a> Batches<'a> {
    pub(crate) fn new(groups: Groups, weights: &'a [f32], table: &'a [f64]) -> Self {
        Self { groups, weights, table, row: 0, group: 0 }
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let Self { groups, weights, table, .. } = *self;
        let (zero, one) = ([0.0; LANES], [1.0; LANES]);
        let mut batch = Batch {
            len: 0,
            first: [0; LANES],
            count: 0,
            theta: [zero; LARGEST_GROUP],
            inverse: [[zero; LARGEST_GROUP]; LARGEST_GROUP],
        };
        for i in 0..LARGEST_GROUP {
            batch.inverse[i][i] = one;
        }
        while batch.count < LANES {
            if self.group == groups.per_row() {
                (self.row, self.group) = (self.row + groups.row(), 0);
            }
            if self.row >= weights.len() {
                break;
            }
            let mut members = groups.members(self.group);
            let len = members.clone().count();
            if batch.count > 0 && len != batch.len {
                break;
            }
            let (lane, first) = (batch.count, self.row + members.next()?);
            for i in 0..len {
                let at = first + i * groups.step();
                batch.theta[i][lane] = f64::from(weights[at]);
                for j in i..len {
                    batch.inverse[j][i][lane] = table[(j - i) * weights.len() + at];
                }
            }
            batch.first[lane] = first;
            (batch.len, batch.count) = (len, lane + 1);
            self.group += 1;
        }
        (batch.count > 0).then_some(batch)
    }
}

/// The Cholesky factor of `[A⁻¹]_PP` and what depends on it, a row for each member of `P`.
struct Prefix {
    factor: [[Lanes; LARGEST_GROUP]; LARGEST_GROUP],
    solved: [Lanes; LARGEST_GROUP],
    /// `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P` up to each row.
    cost: [Lanes; LARGEST_GROUP],
}

impl Prefix {
    #[inline(always)]
    fn new() -> Self {
        let zero = [0.0; LANES];
        Self {
            factor: [[zero; LARGEST_GROUP]; LARGEST_GROUP],
            solved: [zero; LARGEST_GROUP],
            cost: [zero; LARGEST_GROUP],
        }
    }

    /// Compute a row from those before it; `members` are the members of `P`, ascending.
    #[inline(always)]
    fn extend(&mut self, batch: &Batch, members: &[usize; LARGEST_GROUP], row: usize) {
        let Self { factor, solved, cost } = self;
        let i = members[row];
        let (mut value, mut pivot) = (batch.theta[i], batch.inverse[i][i]);
        for column in 0..row {
            let mut known = [0.0; LANES];
            for k in 0..column {
                for lane in 0..LANES {
                    known[lane] += factor[row][k][lane] * factor[column][k][lane];
                }
            }
            let inverse = &batch.inverse[i][members[column]];
            for lane in 0..LANES {
                let entry = (inverse[lane] - known[lane]) / factor[column][column][lane];
                factor[row][column][lane] = entry;
                value[lane] -= entry * solved[column][lane];
                pivot[lane] -= entry * entry;
            }
        }
        for lane in 0..LANES {
            let root = pivot[lane].max(f64::MIN_POSITIVE).sqrt();
            factor[row][row][lane] = root;
            solved[row][lane] = value[lane] / root;
            let before = if row > 0 { cost[row - 1][lane] } else { 0.0 };
            cost[row][lane] = before + solved[row][lane] * solved[row][lane];
        }
    }
}

/// The sets of `count` members that cost least, as bits; the earliest members among equals.
pub(crate) struct Cheapest<'a> {
    pub batch: &'a Batch,
    pub count: usize,
}

impl Kernel<f64> for Cheapest<'_> {
    type Output = [u32; LANES];

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, _simd: S) -> [u32; LANES] {
        let Self { batch, count } = self;
        let mut prefix = Prefix::new();
        let mut members: [usize; LARGEST_GROUP] = std::array::from_fn(|k| k);
        let mut best = [f64::INFINITY; LANES];
        let mut sets = [(1u32 << count) - 1; LANES];
        if count == 0 {
            return sets;
        }
        // Sets in lexical order share the rows of the members that they begin with.
        let mut row = 0;
        loop {
            while row < count {
                prefix.extend(batch, &members, row);
                row += 1;
            }
            let set = members[..count].iter().fold(0, |set, k| set | 1 << k);
            for lane in 0..LANES {
                let cost = prefix.cost[count - 1][lane] / 2.0;
                if cost < best[lane] || (cost == best[lane] && set < sets[lane]) {
                    (best[lane], sets[lane]) = (cost, set);
                }
            }
            // The last member that is not at its end moves on, and the others follow it.
            let Some(last) = (0..count).rev().find(|k| members[*k] + count < batch.len + k) else {
                return sets;
            };
            members[last] += 1;
            for k in last + 1..count {
                members[k] = members[k - 1] + 1;
            }
            row = last;
        }
    }
}

/// The costs of all members.
pub(crate) struct Whole<'a> {
    pub batch: &'a Batch,
}

impl Kernel<f64> for Whole<'_> {
    type Output = Lanes;

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, _simd: S) -> Lanes {
        let batch = self.batch;
        let mut prefix = Prefix::new();
        let members = std::array::from_fn(|k| k);
        for row in 0..batch.len {
            prefix.extend(batch, &members, row);
        }
        prefix.cost[batch.len - 1].map(|cost| cost / 2.0)
    }
}
