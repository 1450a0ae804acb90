//! Greedy elimination (Optimal Brain Surgeon, Hassibi & Stork 1993, one weight at a time).
//!
//! In each block: remove the weight with the least cost `θ_j² / (2 H_jj)`, `H = A⁻¹`; move the others
//! by `-H e_j θ_j / H_jj`; strike row and column `j` from `H` (a rank-one downdate); repeat. The
//! downdates are those of a Cholesky factorisation of `H` whose pivots the costs choose, so the
//! current column `j` is `h_j = H_:j - sum_s h_s h_s[j] / p_s`, with `h_s` the columns of the steps before
//! and `p_s` their pivots.
//! A few steps' columns are kept apart and then taken off `H` together, by the Gram kernel; weights
//! that are out leave the matrix when they are many. Small blocks go their own way ([`small`]).

use rayon::prelude::*;

use crate::dense::{subtract_row, zeros, Scratch};
use crate::error::{check_length, Result};
use crate::factor::{check_damping, Report, Statistics};
use crate::layout::{row_base, triangle};
use crate::parallel;
use crate::simd::{dispatch, Isa, Kernel, Real, Simd};
use crate::small::{self, smaller};
use crate::tiles::{add_gram, padded};

/// Steps whose columns are taken off the matrix together.
const STEPS: usize = 24;

/// Blocks that are walked through side by side: each step waits for the one before it, and another
/// block's step fills the wait. Larger blocks keep the processor busy, and fill the cache, alone.
const ABREAST: usize = 2;
const ABREAST_UP_TO: usize = 128;

/// Costs and turns of all weights of a parameter.
///
/// `scores[j]` is the running maximum of the elimination costs of `j`'s block up to its turn, so
/// that one threshold over all blocks cuts each at a prefix of its own order; `turns[j]` is `j`'s
/// place in that order. A weight that is pruned already has score `-inf` and turn 0; scores of blocks
/// that cannot be factored are NaN.
///
/// # Errors
/// [`crate::Error::Length`] and [`crate::Error::Value`] for arguments that do not fit.
pub fn eliminate<T: Real>(
    statistics: Statistics<'_, T>,
    weights: &[f32],
    damping: f64,
    scores: &mut [f32],
    turns: &mut [u32],
) -> Result<Report> {
    eliminate_with(Isa::best(), statistics, weights, damping, scores, turns)
}

fn eliminate_with<T: Real>(
    isa: Isa,
    statistics: Statistics<'_, T>,
    weights: &[f32],
    damping: f64,
    scores: &mut [f32],
    turns: &mut [u32],
) -> Result<Report> {
    statistics.check()?;
    check_damping(damping)?;
    let layout = statistics.layout;
    check_length("weights", weights.len(), layout.len)?;
    check_length("scores", scores.len(), layout.len)?;
    check_length("turns", turns.len(), layout.len)?;
    let block = layout.block;
    let abreast = if block <= ABREAST_UP_TO { ABREAST } else { 1 };
    let mut blocks: Vec<Option<f64>> = vec![None; layout.blocks()];
    parallel::run(|| {
        scores
            .par_chunks_mut(abreast * block)
            .zip(turns.par_chunks_mut(abreast * block))
            .zip(weights.par_chunks(abreast * block))
            .zip(blocks.par_chunks_mut(abreast))
            .enumerate()
            .for_each_init(
                Scratches::default,
                |scratch, (i, (((scores, turns), weights), out))| {
                    let chunks = scores.chunks_mut(block).zip(turns.chunks_mut(block));
                    let jobs = std::array::from_fn(|_| None);
                    let mut group = Group { jobs, scratch, out };
                    for (k, ((scores, turns), weights)) in
                        chunks.zip(weights.chunks(block)).enumerate()
                    {
                        let b = i * abreast + k;
                        group.jobs[k] =
                            Some(Block { statistics, b, weights, damping, scores, turns });
                    }
                    dispatch(isa, group);
                },
            );
    });
    Ok(blocks.into())
}

type Scratches = [Scratch; ABREAST];

/// Blocks that are walked through side by side; `out` gets their sensitivities, `None` for a block
/// that cannot be factored.
struct Group<'a, T> {
    jobs: [Option<Block<'a, T>>; ABREAST],
    scratch: &'a mut Scratches,
    out: &'a mut [Option<f64>],
}

impl<T: Real> Kernel<f64> for Group<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self) {
        // The first block is the largest.
        if self.jobs[0].as_ref().is_some_and(|job| job.weights.len() <= small::LARGEST) {
            return self.small(S::ISA);
        }
        let Self { jobs, scratch, out } = self;
        let mut walks: [Option<Walk<'_>>; ABREAST] = std::array::from_fn(|_| None);
        let parts = walks.iter_mut().zip(jobs).zip(scratch).zip(out);
        for (((walk, job), scratch), out) in parts {
            *walk = job.and_then(|job| job.start::<S>(scratch, out));
        }
        let mut busy = true;
        while busy {
            busy = false;
            for walk in walks.iter_mut().flatten() {
                busy |= walk.step::<S>();
            }
        }
    }
}

impl<T: Real> Group<'_, T> {
    #[inline(always)]
    fn small(self, isa: Isa) {
        let Self { jobs, scratch, out } = self;
        let mut blocks: [Option<small::Block<'_>>; ABREAST] = std::array::from_fn(|_| None);
        let parts = blocks.iter_mut().zip(jobs).zip(scratch).zip(out);
        for (((block, job), scratch), out) in parts {
            let Some(job) = job else { continue };
            let Block { statistics, b, weights, damping, scores, turns } = job;
            *out = statistics.inverse_of(isa, b, damping, scratch);
            if out.is_none() {
                scores.fill(f32::NAN);
                continue;
            }
            let kept = statistics.kept_in(b);
            *block = Some(small::Block { scratch, weights, kept, scores, turns });
        }
        dispatch(isa, small::Abreast { blocks });
    }
}

struct Block<'a, T> {
    statistics: Statistics<'a, T>,
    b: usize,
    weights: &'a [f32],
    damping: f64,
    scores: &'a mut [f32],
    turns: &'a mut [u32],
}

impl<'a, T: Real> Block<'a, T> {
    /// Invert the block and set its sensitivity; `None` when it cannot be factored.
    #[inline(always)]
    fn start<S: Simd<T = f64>>(
        self,
        scratch: &'a mut Scratch,
        out: &mut Option<f64>,
    ) -> Option<Walk<'a>> {
        let Self { statistics, b, weights, damping, scores, turns } = self;
        let size = weights.len();
        *out = statistics.inverse_of(S::ISA, b, damping, scratch);
        if out.is_none() {
            scores.fill(f32::NAN);
            return None;
        }
        let inverse = &mut scratch.packed[..triangle(size)];
        // Negated, so that the Gram kernel, which adds, takes columns off it.
        inverse.iter_mut().for_each(|x| *x = -*x);

        let mut left = Left::new(weights, inverse, &mut scratch.row);
        let mut turn = 0;
        if let Some(kept) = statistics.kept_in(b) {
            for j in (0..size).filter(|j| !kept[*j]) {
                left.strike(j);
                scores[j] = f32::NEG_INFINITY;
                turns[j] = 0;
                turn += 1;
            }
        }
        left.price::<S>();
        // The factor is used up: its memory takes the columns.
        let len = STEPS.min(size) * padded(size);
        let columns = &mut scratch.upper[..len];
        columns.fill(0.0);
        let (steps, highest) = (0, 0.0);
        Some(Walk { left, inverse, columns, steps, turn, highest, scores, turns })
    }
}

/// A block on its way: weights go out one at a time.
struct Walk<'a> {
    left: Left<'a>,
    /// `-H`, as it was when columns were last taken off.
    inverse: &'a mut [f64],
    /// The columns of the `steps` since then, each over the root of its pivot.
    columns: &'a mut [f64],
    steps: usize,
    turn: usize,
    highest: f64,
    scores: &'a mut [f32],
    turns: &'a mut [u32],
}

impl Walk<'_> {
    /// Remove a weight; says whether any was left.
    #[inline(always)]
    fn step<S: Simd<T = f64>>(&mut self) -> bool {
        let Self { left, inverse, columns, steps, turn, highest, scores, turns } = self;
        let size = scores.len();
        if *turn == size {
            return false;
        }
        let (cost, at) = left.cheapest::<S>();
        left.strike(at);
        let j = left.index[at];
        *highest = highest.max(cost);
        scores[j] = *highest as f32;
        turns[j] = *turn as u32;
        *turn += 1;

        let stride = padded(left.index.len());
        let (earlier, column) = columns.split_at_mut(*steps * stride);
        let column = &mut column[..stride];
        left.column(at, inverse, column);
        let factors = &earlier[at.min(earlier.len())..];
        let n = left.index.len().next_multiple_of(S::W);
        subtract_row::<S>(&mut column[..n], earlier, stride, *steps, factors, stride);
        left.remove::<S>(at, column);
        *steps += 1;
        if *steps == STEPS && *turn < size {
            left.compact::<S>(inverse, &mut columns[..STEPS * stride]);
            let m = left.index.len();
            let packed = &mut inverse[..triangle(m)];
            add_gram(S::ISA, columns, STEPS, m, padded(m), packed);
            *steps = 0;
        }
        true
    }
}

/// The weights that are left in the matrix, some of them out already.
struct Left<'a> {
    /// Places in the block, ascending.
    index: Vec<usize>,
    theta: &'a mut [f64],
    /// `H_jj`.
    diagonal: &'a mut [f64],
    /// Added to the costs: zero, or infinity for a weight that is out.
    out: &'a mut [f64],
    costs: &'a mut [f64],
    /// The least cost of each lane.
    least: [f64; LANES],
}

/// The most lanes of a vector.
const LANES: usize = 8;

impl<'a> Left<'a> {
    fn new(weights: &[f32], negated: &[f64], memory: &'a mut Vec<f64>) -> Self {
        let size = weights.len();
        let stride = padded(size);
        let (theta, rest) = zeros(memory, 4 * stride).split_at_mut(stride);
        let (diagonal, rest) = rest.split_at_mut(stride);
        let (out, costs) = rest.split_at_mut(stride);
        for (j, w) in weights.iter().enumerate() {
            theta[j] = f64::from(*w);
            diagonal[j] = -negated[row_base(size, j) + j];
        }
        diagonal[size..].fill(1.0);
        out[size..].fill(f64::INFINITY);
        let least = [f64::INFINITY; LANES];
        Self { index: (0..size).collect(), theta, diagonal, out, costs, least }
    }

    fn strike(&mut self, at: usize) {
        self.out[at] = f64::INFINITY;
    }

    /// Price all weights, where no step has.
    #[inline(always)]
    fn price<S: Simd<T = f64>>(&mut self) {
        self.update::<S>(0.0, None);
    }

    /// The least cost and the first place that has it.
    #[inline(always)]
    fn cheapest<S: Simd<T = f64>>(&self) -> (f64, usize) {
        let mut least = self.least;
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                least[lane] = smaller(least[lane + width], least[lane]);
            }
            width /= 2;
        }
        let (n, least) = (self.index.len().next_multiple_of(S::W), least[0]);
        // Costs that overflow are all alike: any weight that is not out will do.
        let (wanted, value) =
            if least < f64::INFINITY { (&self.costs[..n], least) } else { (&self.out[..n], 0.0) };
        // Many lanes at a time: where the place is cannot be guessed, and a branch on it costs more.
        let mut found = 0;
        for (part, wanted) in wanted.chunks(64).enumerate() {
            let mut bits = 0u64;
            for (v, lanes) in wanted.chunks_exact(S::W).enumerate() {
                // SAFETY: `lanes` is a whole vector; the instruction set is here.
                let equal =
                    unsafe { S::equal(S::load(lanes.as_ptr()), S::splat(&raw const value)) };
                bits |= u64::from(equal) << (v * S::W);
            }
            if bits != 0 {
                found = 64 * part + bits.trailing_zeros() as usize;
                break;
            }
        }
        (least, found)
    }

    /// `H_:j`, as it was when columns were last taken off.
    #[inline(always)]
    fn column(&self, at: usize, negated: &[f64], column: &mut [f64]) {
        let n = self.index.len();
        let mut place = at;
        for (i, h) in column[..at].iter_mut().enumerate() {
            *h = -negated[place];
            place += n - i - 1;
        }
        let row = &negated[row_base(n, at) + at..row_base(n, at) + n];
        for (h, x) in column[at..].iter_mut().zip(row) {
            *h = -x;
        }
        column[n..].fill(0.0);
    }

    /// Move the other weights, downdate the diagonal, and price what is left; the column becomes
    /// itself over the root of its pivot.
    #[inline(always)]
    fn remove<S: Simd<T = f64>>(&mut self, at: usize, column: &mut [f64]) {
        let inverse = 1.0 / self.diagonal[at].max(f64::MIN_POSITIVE);
        self.update::<S>(self.theta[at], Some((column, inverse)));
    }

    /// One pass over the weights: in registers each is moved and priced at once.
    #[inline(always)]
    fn update<S: Simd<T = f64>>(&mut self, theta_at: f64, column: Option<(&mut [f64], f64)>) {
        let n = self.index.len().next_multiple_of(S::W);
        let (theta, diagonal) = (&mut self.theta[..n], &mut self.diagonal[..n]);
        let (out, costs) = (&self.out[..n], &mut self.costs[..n]);
        // SAFETY: all slices hold `n` elements, a whole number of vectors; the instruction set is
        // here.
        unsafe {
            let splat = |x: f64| S::splat(&raw const x);
            let mut least = splat(f64::INFINITY);
            let tiny = splat(f64::MIN_POSITIVE);
            let column = column.map(|(column, inverse)| {
                let (slope, minus) = (splat(-theta_at * inverse), splat(-inverse));
                (column[..n].as_mut_ptr(), splat(inverse.sqrt()), slope, minus)
            });
            for i in (0..n).step_by(S::W) {
                let mut t = S::load(theta.as_ptr().add(i));
                let mut d = S::load(diagonal.as_ptr().add(i));
                if let Some((column, root, slope, minus)) = column {
                    let h = S::load(column.add(i));
                    S::store(column.add(i), S::mul(h, root));
                    t = S::mul_add(slope, h, t);
                    S::store(theta.as_mut_ptr().add(i), t);
                    d = S::max(S::mul_add(S::mul(h, minus), h, d), tiny);
                    S::store(diagonal.as_mut_ptr().add(i), d);
                }
                let cost = S::div(S::mul(t, t), S::add(d, d));
                let cost = S::add(cost, S::load(out.as_ptr().add(i)));
                S::store(costs.as_mut_ptr().add(i), cost);
                least = S::min(cost, least);
            }
            self.least = [f64::INFINITY; LANES];
            S::store(self.least.as_mut_ptr(), least);
        }
    }

    /// Leave out of the matrix and the columns the weights that are out, if they are a quarter.
    fn compact<S: Simd<T = f64>>(&mut self, negated: &mut [f64], columns: &mut [f64]) {
        let n = self.index.len();
        let stay: Vec<usize> = (0..n).filter(|j| self.out[*j] == 0.0).collect();
        let m = stay.len();
        if 4 * m > 3 * n {
            return;
        }
        let (from, to) = (padded(n), padded(m));
        // Every place moves towards the start, in order: nothing is overwritten before it is read.
        let mut place = 0;
        for (i, row) in stay.iter().enumerate() {
            let base = row_base(n, *row);
            for column in &stay[i..] {
                negated[place] = negated[base + column];
                place += 1;
            }
        }
        for step in 0..columns.len() / from {
            for (i, j) in stay.iter().enumerate() {
                columns[step * to + i] = columns[step * from + j];
            }
            columns[step * to + m..(step + 1) * to].fill(0.0);
        }
        for (i, j) in stay.iter().enumerate() {
            self.theta[i] = self.theta[*j];
            self.diagonal[i] = self.diagonal[*j];
            self.out[i] = 0.0;
        }
        self.theta[m..].fill(0.0);
        self.diagonal[m..].fill(1.0);
        self.out[m..].fill(f64::INFINITY);
        self.index = stay.iter().map(|j| self.index[*j]).collect();
        self.price::<S>();
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

    /// Scores and turns of one block from `H`, rows `block` apart.
    fn slow(h: &[f64], block: usize, theta: &[f32], kept: &[bool]) -> (Vec<f32>, Vec<u32>) {
        let size = theta.len();
        let mut h: Vec<Vec<f64>> =
            h.chunks(block).take(size).map(|row| row[..size].into()).collect();
        let mut theta: Vec<f64> = theta.iter().map(|x| f64::from(*x)).collect();
        let mut left: Vec<usize> = (0..size).filter(|j| kept[*j]).collect();
        let (mut scores, mut turns) = (vec![f32::NEG_INFINITY; size], vec![0; size]);
        let mut highest = 0.0f64;
        while !left.is_empty() {
            let cost = |j: &usize| theta[*j] * theta[*j] / (2.0 * h[*j][*j]);
            let j = *left.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).expect("one is left");
            highest = highest.max(cost(&j));
            (scores[j], turns[j]) = (highest as f32, (size - left.len()) as u32);
            left.retain(|i| *i != j);
            let column = h[j].clone();
            let at = theta[j];
            for i in &left {
                theta[*i] -= column[*i] * at / column[j];
                for k in &left {
                    h[*i][*k] -= column[*i] * column[*k] / column[j];
                }
            }
        }
        (scores, turns)
    }

    #[test]
    fn every_instruction_set_takes_the_same_steps() {
        let edges =
            [1usize, 2, 5, 8, 9, 16, 17, 24, 31, 32, 33, 40, 41, 48, 49, 56, 64, 70, 100, 131];
        for (block, share) in edges.into_iter().flat_map(|block| [(block, 1.0), (block, 0.2)]) {
            // Two blocks side by side, then a short one alone.
            let layout = Layout::new(2 * block + block.div_ceil(3), block);
            let (samples, damping) = (2 * block + 3, 1e-2);
            let data = random(5, samples * layout.len);
            let weights: Vec<f32> = random(6, layout.len).iter().map(|x| *x as f32).collect();
            let kept: Vec<bool> = random(7, layout.len).iter().map(|x| *x < share).collect();
            let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; layout.len]);
            let rows = Rows::new(&data, samples, layout.len, layout.len).expect("rows");
            accumulate(layout, rows, &mut packed, &mut sums, true).expect("accumulate");
            let samples = samples as f64;
            let statistics = Statistics { layout, packed: &packed, samples, kept: Some(&kept) };
            let mut full = vec![0.0; layout.blocks() * block * block];
            inverse(statistics, damping, &mut full).expect("inverse");
            for isa in Isa::available() {
                let (mut scores, mut turns) = (vec![0.0; layout.len], vec![0; layout.len]);
                let report =
                    eliminate_with(isa, statistics, &weights, damping, &mut scores, &mut turns);
                assert!(report.expect("report").failed.is_empty());
                for b in 0..layout.blocks() {
                    let part = b * block..b * block + layout.size(b);
                    let h = &full[b * block * block..];
                    let (want, order) = slow(h, block, &weights[part.clone()], &kept[part.clone()]);
                    assert_eq!(turns[part.clone()], order, "{isa:?}, block {b} of {block}");
                    for (got, want) in scores[part].iter().zip(&want) {
                        assert!(got == want || (got / want - 1.0).abs() < 1e-5, "{got} {want}");
                    }
                }
            }
        }
    }
}
