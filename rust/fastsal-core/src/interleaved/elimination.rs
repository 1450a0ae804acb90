//! Greedy elimination of small blocks, one block in each lane of a vector.
//!
//! In one block each step waits for the choice of the step before, longer than the arithmetic takes;
//! here every operation belongs to several blocks. Each lane removes its own weight: its column is
//! copied to the same place as those of the other lanes, the last weight moves to the place of the removed
//! one, and from there on all lanes do the same. The columns of a few steps are kept apart and then
//! subtracted from `H` together.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::tiles::{add_products, ROWS};
use super::{Group, BLOCKS, LARGEST};
use crate::greedy_state::Order;
use crate::isa::Set;
use crate::layout::triangle;
use crate::memory::Aligned;
use crate::simd::{Kernel, Simd};
use crate::statistics::Damped;

/// Steps whose columns are subtracted from the matrix together.
const STEPS: usize = 4;

/// Eliminate the weights of blocks of one size, at most [`BLOCKS`], the first of them `b`.
///
/// Returns their sensitivities, `None` for those that are not positive definite.
pub(crate) struct Eliminate<'a> {
    pub damped: Damped<'a>,
    pub b: usize,
    pub size: usize,
    pub memory: &'a mut Memory,
    pub weights: &'a [f32],
    pub scores: &'a mut [f32],
    pub turns: &'a mut [u32],
}

/// A worker's memory.
#[derive(Default)]
pub(crate) struct Memory {
    square: Aligned<f64>,
    state: Aligned<f64>,
}

impl Kernel<f64> for Eliminate<'_> {
    type Output = [Option<f64>; BLOCKS];

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) -> [Option<f64>; BLOCKS] {
        let Self { damped, b, size, memory, weights, scores, turns } = self;
        let mut found = [None; BLOCKS];
        let parts = weights.chunks(S::W * size).zip(scores.chunks_mut(S::W * size));
        let parts = parts.zip(turns.chunks_mut(S::W * size)).zip(found.chunks_mut(S::W));
        for (group, (((weights, scores), turns), found)) in parts.enumerate() {
            let (first, count) = (b + group * S::W, weights.len() / size);
            let mut group = Group::<S>::new(simd, &mut memory.square, size);
            group.read(damped, first, count);
            group.invert();
            let mut orders: [Option<Order<'_>>; BLOCKS] = Default::default();
            let parts = scores.chunks_mut(size).zip(turns.chunks_mut(size));
            for (lane, (scores, turns)) in parts.enumerate() {
                found[lane] = group.sensitivity(damped, first + lane, lane);
                if found[lane].is_some() {
                    orders[lane] = Some(Order::new(damped.kept_in(first + lane), scores, turns));
                } else {
                    scores.fill(f32::NAN);
                }
            }
            Elimination::new(&group, &mut memory.state, weights, orders).run();
        }
        found
    }
}

/// Blocks of one size during elimination; all arrays are of vectors, `rows` of them unless said.
struct Elimination<'a, S: Simd<T = f64>> {
    simd: S,
    rows: usize,
    /// The weights that are left are at places below this, in every lane.
    used: usize,
    /// `-H` as of the last time that columns were subtracted, its lower triangle row by row.
    lower: &'a mut [f64],
    /// `[STEPS, rows + 1, W]`: the negated columns of the steps since then, each over the root of its pivot.
    columns: &'a mut [f64],
    /// Infinity at a place without a weight, so that its cost is infinite, too.
    theta: &'a mut [f64],
    /// `H_jj`, downdated.
    diagonal: &'a mut [f64],
    /// Which weight of its block is at a place; infinity where none is.
    weight: &'a mut [f64],
    /// The place of each weight, of each lane.
    places: [[u8; LARGEST]; BLOCKS],
    /// The least cost of each lane, and the first weight that has it.
    least: [f64; BLOCKS],
    first: [f64; BLOCKS],
    orders: [Option<Order<'a>>; BLOCKS],
}

impl<'a, S: Simd<T = f64>> Elimination<'a, S> {
    #[inline(always)]
    fn new(
        group: &Group<'_, S>,
        memory: &'a mut Aligned<f64>,
        weights: &[f32],
        orders: [Option<Order<'a>>; BLOCKS],
    ) -> Self {
        let (w, rows, size) = (S::W, group.rows, group.size);
        assert!(size <= LARGEST && weights.len() <= w * size && w <= BLOCKS);
        let row = rows * w;
        let (lower_len, columns_len) = (triangle(rows) * w, STEPS * (row + w));
        let memory = memory.room(lower_len + columns_len + 3 * row);
        let (lower, rest) = memory.split_at_mut(lower_len);
        group.write_negated_inverses(lower);
        let (columns, rest) = rest.split_at_mut(columns_len);
        let (theta, rest) = rest.split_at_mut(row);
        let (diagonal, weight) = rest.split_at_mut(row);
        diagonal.copy_from_slice(group.diagonal);
        theta.fill(f64::INFINITY);
        weight.fill(f64::INFINITY);
        for (lane, (values, order)) in weights.chunks(size).zip(&orders).enumerate() {
            let Some(order) = order else { continue };
            for (j, x) in values.iter().enumerate().filter(|(j, _)| !order.is_removed(*j)) {
                (theta[j * w + lane], weight[j * w + lane]) = (f64::from(*x), j as f64);
            }
        }
        let places = [std::array::from_fn(|j| j as u8); BLOCKS];
        let (least, first) = ([f64::INFINITY; BLOCKS], [f64::INFINITY; BLOCKS]);
        let (simd, used) = (group.simd, size);
        Self {
            simd,
            rows,
            used,
            lower,
            columns,
            theta,
            diagonal,
            weight,
            places,
            least,
            first,
            orders,
        }
    }

    /// The most weights that are left in a block.
    #[inline(always)]
    fn left(&self) -> usize {
        self.orders.iter().flatten().map(Order::left).max().unwrap_or(0)
    }

    /// From a column to the next: an odd number of vectors, as in [`Group`].
    #[inline(always)]
    fn column(&self) -> usize {
        (self.rows + 1) * S::W
    }

    /// Check what the pointers below need: arrays for `rows` places.
    #[inline(always)]
    fn check(&self) {
        let row = self.rows * S::W;
        assert!(self.used <= self.rows && self.rows.is_multiple_of(ROWS) && S::W <= BLOCKS);
        assert!(self.lower.len() == triangle(self.rows) * S::W);
        assert!(self.columns.len() == STEPS * self.column());
        assert!(self.theta.len() == row && self.diagonal.len() == row && self.weight.len() == row);
    }

    #[inline(always)]
    fn run(mut self) {
        let _ = self.simd;
        let (nothing, no_factors) = ([0.0; BLOCKS], [0.0; STEPS * BLOCKS]);
        self.gather();
        self.settle::<false>(0, &no_factors, &nothing, &nothing);
        while self.used > 0 {
            let steps = STEPS.min(self.used);
            for step in 0..steps {
                self.step(step);
            }
            if self.used > 0 {
                self.subtract();
            }
        }
    }

    /// Move the weights that are left to the first places, before the first step, and clear the columns.
    #[inline(always)]
    fn gather(&mut self) {
        let left = self.left();
        for lane in 0..S::W {
            let mut free = 0;
            for from in (left..self.used).rev() {
                if self.weight[from * S::W + lane] < f64::INFINITY {
                    // There is one: no block has more than `left` weights.
                    while self.weight[free * S::W + lane] < f64::INFINITY {
                        free += 1;
                    }
                    self.take(0, lane, free, from, &mut [0.0; STEPS * BLOCKS]);
                }
            }
        }
        self.columns.fill(0.0);
        self.used = left;
    }

    /// Remove a weight of each block that has any left.
    #[inline(always)]
    fn step(&mut self, step: usize) {
        let w = S::W;
        let (mut theta, mut pivots) = ([0.0; BLOCKS], [f64::INFINITY; BLOCKS]);
        let mut factors = [0.0; STEPS * BLOCKS];
        let (last, column_len) = (self.used - 1, self.column());
        for lane in 0..w {
            let Some(order) = self.orders[lane].as_mut().filter(|order| order.left() > 0) else {
                let column = &mut self.columns[step * column_len..(step + 1) * column_len];
                column.iter_mut().skip(lane).step_by(w).for_each(|x| *x = 0.0);
                continue;
            };
            let mut j = self.first[lane];
            if j == f64::INFINITY {
                // Costs that are not numbers are all alike: the first weight that is left.
                j = self.weight.iter().skip(lane).step_by(w).fold(j, |first, x| first.min(*x));
            }
            let j = j as usize;
            order.remove(j, self.least[lane]);
            let at = usize::from(self.places[lane][j]);
            let place = at * w + lane;
            theta[lane] = self.theta[place];
            pivots[lane] = self.diagonal[place].max(f64::MIN_POSITIVE);
            self.take(step, lane, at, last, &mut factors);
        }
        self.used = last;
        self.settle::<true>(step, &factors, &theta, &pivots);
    }

    /// Copy column `at` of `H` of a lane to that of the step and the entries of the earlier columns to
    /// `factors`, and move the weight at `last` there.
    #[inline(always)]
    fn take(
        &mut self,
        step: usize,
        lane: usize,
        at: usize,
        last: usize,
        factors: &mut [f64; STEPS * BLOCKS],
    ) {
        let w = S::W;
        self.check();
        assert!(at <= last && last < self.rows && lane < w && step < STEPS);
        let (new, old) = (at * w + lane, last * w + lane);
        // SAFETY: places up to `last` of a triangle, columns and rows of `rows` places.
        unsafe {
            let columns = self.columns.as_mut_ptr();
            for k in 0..step {
                let column = columns.add(k * self.column());
                factors[k * w + lane] = *column.add(new);
                *column.add(new) = *column.add(old);
            }
            let lower = self.lower.as_mut_ptr().add(lane);
            let mut moved = lower.add(triangle(last) * w);
            let mut place = lower.add(triangle(at) * w);
            let mut to = columns.add(step * self.column() + lane);
            for _ in 0..at {
                *to = *place;
                *place = *moved;
                (to, place, moved) = (to.add(w), place.add(w), moved.add(w));
            }
            if at < last {
                // The removed weight itself, whose place the last one has now.
                *to = *moved;
                *place = *lower.add((triangle(last) + last) * w);
                for i in at + 1..last {
                    (to, place, moved) = (to.add(w), place.add(i * w), moved.add(w));
                    *to = *place;
                    *place = *moved;
                }
                to = to.add(w);
            }
            *to = 0.0;
        }
        let j = self.weight[old];
        (self.theta[new], self.diagonal[new], self.weight[new]) =
            (self.theta[old], self.diagonal[old], j);
        (self.theta[old], self.diagonal[old], self.weight[old]) =
            (f64::INFINITY, 1.0, f64::INFINITY);
        if j < f64::INFINITY {
            self.places[lane][j as usize] = at as u8;
        }
    }

    /// Bring the column of a step up to date, move the weights along it, downdate the diagonal, and
    /// price the rest; without `MOVES`, only price.
    #[inline(always)]
    fn settle<const MOVES: bool>(
        &mut self,
        step: usize,
        factors: &[f64; STEPS * BLOCKS],
        theta_at: &[f64; BLOCKS],
        pivots: &[f64; BLOCKS],
    ) {
        let (w, rows) = (S::W, self.used.next_multiple_of(ROWS));
        self.check();
        assert!(step < STEPS);
        let (theta, diagonal) = (self.theta.as_mut_ptr(), self.diagonal.as_mut_ptr());
        let (weight, columns) = (self.weight.as_ptr(), self.columns.as_mut_ptr());
        // SAFETY: all places are below `self.rows`, a multiple of `ROWS`; `simd` is the proof of the
        // instruction set.
        unsafe {
            let splat = |x: f64| S::splat(&raw const x);
            let minus_one = splat(-1.0);
            let (tiny, infinity) = (splat(f64::MIN_POSITIVE), splat(f64::INFINITY));
            let minus = S::div(minus_one, S::load(pivots.as_ptr()));
            let inverse = S::mul(minus, minus_one);
            let (slope, root) = (S::mul(S::load(theta_at.as_ptr()), inverse), S::sqrt(inverse));
            let (mut least, mut first) = ([infinity; ROWS], [infinity; ROWS]);
            for i in (0..rows).step_by(ROWS) {
                let mut x = [S::zero(); ROWS];
                let to = columns.add(step * self.column() + i * w);
                if MOVES {
                    for r in 0..ROWS {
                        x[r] = S::load(to.add(r * w));
                    }
                    let mut from = columns.add(i * w);
                    for k in 0..step {
                        let factor = S::load(factors.as_ptr().add(k * w));
                        for r in 0..ROWS {
                            x[r] = S::mul_add(factor, S::load(from.add(r * w)), x[r]);
                        }
                        from = from.add(self.column());
                    }
                }
                for r in 0..ROWS {
                    let at = (i + r) * w;
                    let (mut t, mut d) = (S::load(theta.add(at)), S::load(diagonal.add(at)));
                    if MOVES {
                        S::store(to.add(r * w), S::mul(x[r], root));
                        t = S::mul_add(slope, x[r], t);
                        d = S::max(S::mul_add(S::mul(x[r], minus), x[r], d), tiny);
                        S::store(theta.add(at), t);
                        S::store(diagonal.add(at), d);
                    }
                    let cost = S::div(S::mul(t, t), S::add(d, d));
                    earlier::<S>(&mut least[r], &mut first[r], cost, S::load(weight.add(at)));
                }
            }
            for r in 1..ROWS {
                let (cost, weight) = (least[r], first[r]);
                earlier::<S>(&mut least[0], &mut first[0], cost, weight);
            }
            S::store(self.least.as_mut_ptr(), least[0]);
            S::store(self.first.as_mut_ptr(), first[0]);
        }
    }

    /// Subtract the columns of all steps from `H`.
    #[inline(always)]
    fn subtract(&mut self) {
        self.check();
        let (rows, column) = (self.used.next_multiple_of(ROWS), self.column());
        let (lower, columns) = (self.lower.as_mut_ptr(), self.columns.as_ptr());
        // SAFETY: checked: `rows` is at most `self.rows`; `simd` is the proof of the instruction set.
        unsafe {
            if const { matches!(S::SET, Set::Avx512) } {
                add_products::<S, 4>(lower, columns, rows, column, STEPS);
            } else {
                add_products::<S, 2>(lower, columns, rows, column, STEPS);
            }
        }
    }
}

/// Replace the least costs, and the first weights that have them, by others that are less, or as much
/// of an earlier weight.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
unsafe fn earlier<S: Simd<T = f64>>(least: &mut S::V, first: &mut S::V, cost: S::V, weight: S::V) {
    // SAFETY: by contract.
    unsafe {
        let same = S::where_equal(cost, *least, S::min(weight, *first), *first);
        *first = S::where_less(cost, *least, weight, same);
        *least = S::min(cost, *least);
    }
}
