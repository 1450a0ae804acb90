//! Greedy elimination of blocks of many vectors: the columns of a few steps are kept apart and then
//! subtracted from `H` together, by the kernel of [`syrk`]; removed weights are deleted from the
//! matrix when they are many.

use crate::cholesky::subtract_row;
use crate::greedy_state::{begin, Block, Candidates, Order, MOST_LANES};
use crate::layout::{row_base, triangle};
use crate::parallel::checkpoint_at;
use crate::simd::{padded, Kernel, Simd};
use crate::syrk::syrk;

/// Steps whose columns are subtracted from the matrix together.
const STEPS: usize = 24;

/// Large blocks that are processed in turns.
pub(crate) struct Large<'a, const N: usize> {
    pub blocks: [Option<Block<'a>>; N],
}

impl<const N: usize> Kernel<f64> for Large<'_, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) {
        // A loop: closures do not inherit the instruction set.
        let mut blocks: [Option<Elimination<'_>>; N] = std::array::from_fn(|_| None);
        for (to, block) in blocks.iter_mut().zip(self.blocks) {
            if let Some(block) = block {
                *to = Some(Elimination::new(simd, block));
            }
        }
        let mut busy = true;
        while busy {
            busy = false;
            for block in blocks.iter_mut().flatten() {
                busy |= block.step(simd);
            }
        }
    }
}

/// A large block during elimination.
struct Elimination<'a> {
    rest: Rest<'a>,
    /// `-H`, as of the last time that columns were subtracted.
    negated: &'a mut [f64],
    /// The columns of the `steps` since then, each over the root of its pivot.
    columns: &'a mut [f64],
    steps: usize,
    order: Order<'a>,
}

impl<'a> Elimination<'a> {
    #[inline(always)]
    fn new<S: Simd<T = f64>>(simd: S, block: Block<'a>) -> Self {
        let Block { upper, row, inverse: packed, weights, kept, scores, turns } = block;
        let (size, stride) = (weights.len(), padded(weights.len()));
        let packed = &mut packed[..triangle(size)];
        let (candidates, order) = begin(row, stride, packed, weights, kept, scores, turns);
        let mut rest = Rest { index: (0..size).collect(), candidates };
        rest.price(simd);
        // Negated, so that the kernel, which adds, subtracts columns from it.
        packed.iter_mut().for_each(|x| *x = -*x);
        let columns = upper.room(STEPS.min(size) * stride);
        columns.fill(0.0);
        Self { rest, negated: packed, columns, steps: 0, order }
    }

    /// Remove a weight; return whether any was left.
    #[inline(always)]
    fn step<S: Simd<T = f64>>(&mut self, simd: S) -> bool {
        let Self { rest, negated, columns, steps, order } = self;
        if order.left() == 0 {
            return false;
        }
        if *steps == 0 {
            checkpoint_at(0, order.len());
        }
        let (cost, at) = rest.cheapest(simd);
        rest.candidates.out[at] = f64::INFINITY;
        order.remove(rest.index[at], cost);

        let stride = padded(rest.index.len());
        let (earlier, column) = columns.split_at_mut(*steps * stride);
        let column = &mut column[..stride];
        rest.column(at, negated, column);
        let factors = &earlier[at.min(earlier.len())..];
        let n = rest.index.len().next_multiple_of(S::W);
        subtract_row(simd, &mut column[..n], earlier, stride, *steps, factors, stride);
        rest.remove(simd, at, column);
        *steps += 1;
        if *steps == STEPS && order.left() > 0 {
            rest.compact(simd, negated, &mut columns[..STEPS * stride]);
            let m = rest.index.len();
            syrk(simd.isa(), columns, STEPS, m, padded(m), &mut negated[..triangle(m)]);
            *steps = 0;
        }
        true
    }
}

/// The weights that are still in the matrix, including some that are already removed.
struct Rest<'a> {
    /// Places in the block, ascending.
    index: Vec<usize>,
    candidates: Candidates<'a>,
}

impl Rest<'_> {
    /// Price all weights where no step has.
    #[inline(always)]
    fn price<S: Simd<T = f64>>(&mut self, simd: S) {
        self.update(simd, 0.0, None);
    }

    /// Find the least cost and the first weight that has it.
    #[inline(always)]
    fn cheapest<S: Simd<T = f64>>(&self, _simd: S) -> (f64, usize) {
        let n = self.index.len().next_multiple_of(S::W);
        let (least, wanted, value) = self.candidates.least();
        // Many lanes at a time: the place cannot be predicted, and a branch on it costs more.
        let mut found = 0;
        for (part, wanted) in wanted[..n].chunks(64).enumerate() {
            let mut bits = 0u64;
            for (v, lanes) in wanted.chunks_exact(S::W).enumerate() {
                // SAFETY: `lanes` is a whole vector; `_simd` is the proof.
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

    /// Write `H_:j`, as of the last time that columns were subtracted, to `column`.
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

    /// Move the other weights, downdate the diagonal, and price the rest; the column is divided by the
    /// root of its pivot.
    #[inline(always)]
    fn remove<S: Simd<T = f64>>(&mut self, simd: S, at: usize, column: &mut [f64]) {
        let Candidates { theta, diagonal, .. } = &self.candidates;
        let inverse = 1.0 / diagonal[at].max(f64::MIN_POSITIVE);
        self.update(simd, theta[at], Some((column, inverse)));
    }

    /// Go over the weights once: each is moved and priced in registers.
    #[inline(always)]
    fn update<S: Simd<T = f64>>(
        &mut self,
        _simd: S,
        theta_at: f64,
        column: Option<(&mut [f64], f64)>,
    ) {
        let n = self.index.len().next_multiple_of(S::W);
        let Candidates { theta, diagonal, out, costs, least } = &mut self.candidates;
        let (theta, diagonal) = (&mut theta[..n], &mut diagonal[..n]);
        let (out, costs) = (&out[..n], &mut costs[..n]);
        // SAFETY: all slices hold `n` elements, a whole number of vectors; `_simd` is the proof of the
        // instruction set.
        unsafe {
            let splat = |x: f64| S::splat(&raw const x);
            let mut smallest = splat(f64::INFINITY);
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
                smallest = S::min(cost, smallest);
            }
            *least = [f64::INFINITY; MOST_LANES];
            S::store(least.as_mut_ptr(), smallest);
        }
    }

    /// Delete removed weights from the matrix and the columns, if they are at least a quarter.
    fn compact<S: Simd<T = f64>>(&mut self, simd: S, negated: &mut [f64], columns: &mut [f64]) {
        let n = self.index.len();
        let stay: Vec<usize> = (0..n).filter(|j| self.candidates.out[*j] == 0.0).collect();
        let m = stay.len();
        if 4 * m > 3 * n {
            return;
        }
        let (from, to) = (padded(n), padded(m));
        // Every entry moves towards the start, in order: nothing is overwritten before it is read.
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
        let Candidates { theta, diagonal, out, .. } = &mut self.candidates;
        for (i, j) in stay.iter().enumerate() {
            theta[i] = theta[*j];
            diagonal[i] = diagonal[*j];
            out[i] = 0.0;
        }
        theta[m..].fill(0.0);
        diagonal[m..].fill(1.0);
        out[m..].fill(f64::INFINITY);
        self.index = stay.iter().map(|j| self.index[*j]).collect();
        self.price(simd);
    }
}
