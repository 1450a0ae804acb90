//! Greedy elimination of blocks of a few vectors, where gathering a column and finding the least cost
//! take longer than the arithmetic: `H` is stored in full, so that a column is a row, and the columns
//! of all steps are kept apart from it to the end.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use crate::greedy_state::{begin, Block, Candidates, Order, MOST_LANES};
use crate::layout::triangle;
use crate::scratch::unpack;
use crate::simd::{padded, Kernel, Simd};

/// The largest block that is processed here.
pub(crate) const LARGEST_SMALL: usize = 48;

/// Length of the longest row: [`LARGEST_SMALL`] padded to whole vectors.
const ROW: usize = padded(LARGEST_SMALL);

/// Infinity in the middle of zeros: a window that begins at `ROW - j` has it at position `j`.
static OUT: [f64; 2 * ROW] = {
    let mut out = [0.0; 2 * ROW];
    out[ROW] = f64::INFINITY;
    out
};

/// Small blocks that are processed in turns.
pub(crate) struct Small<'a, const N: usize> {
    pub blocks: [Option<Block<'a>>; N],
}

impl<const N: usize> Kernel<f64> for Small<'_, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) {
        let sizes = self.blocks.iter().flatten().map(|block| block.weights.len());
        // All have one size (see `greedy`); the largest is 24 portable vectors, 12 of AVX2, 6 of AVX-512.
        match sizes.max().unwrap_or(0).div_ceil(S::W) {
            0 | 1 => self.eliminate::<S, 1>(simd),
            2 => self.eliminate::<S, 2>(simd),
            3 => self.eliminate::<S, 3>(simd),
            4 => self.eliminate::<S, 4>(simd),
            5 => self.eliminate::<S, 5>(simd),
            6 => self.eliminate::<S, 6>(simd),
            7 | 8 => self.eliminate::<S, 8>(simd),
            9..=12 => self.eliminate::<S, 12>(simd),
            _ => self.eliminate::<S, 24>(simd),
        }
    }
}

impl<const N: usize> Small<'_, N> {
    /// Process blocks of at most `NV` vectors.
    #[inline(always)]
    fn eliminate<S: Simd<T = f64>, const NV: usize>(self, simd: S) {
        // No block is wider; code for wider rows is not generated.
        if const { NV * S::W <= ROW } {
            // A loop: closures do not inherit the instruction set.
            let mut blocks: [Option<Elimination<'_>>; N] = std::array::from_fn(|_| None);
            for (to, block) in blocks.iter_mut().zip(self.blocks) {
                if let Some(block) = block {
                    *to = Some(Elimination::new::<S, NV>(simd, block));
                }
            }
            let mut busy = true;
            while busy {
                busy = false;
                for block in blocks.iter_mut().flatten() {
                    busy |= block.step::<S, NV>(simd);
                }
            }
        }
    }
}

/// A small block during elimination. All rows are `NV` vectors long.
struct Elimination<'a> {
    /// `H`, in full.
    inverse: &'a [f64],
    /// For each step the column over the root of its pivot, and a row of zeros.
    columns: &'a mut [f64],
    steps: usize,
    candidates: Candidates<'a>,
    order: Order<'a>,
}

impl<'a> Elimination<'a> {
    #[inline(always)]
    fn new<S: Simd<T = f64>, const NV: usize>(_simd: S, block: Block<'a>) -> Self {
        let Block { upper, lower, row, inverse: packed, weights, kept, scores, turns } = block;
        let (size, stride) = (weights.len(), NV * S::W);
        assert!(size <= stride && stride <= ROW);
        let packed = &packed[..triangle(size)];
        let inverse = upper.room(size * stride);
        unpack(packed, size, inverse, stride);
        for row in inverse.chunks_mut(stride) {
            // Columns beyond the last are read, but no weight is there.
            row[size..].fill(0.0);
        }
        let columns = lower.room((size + 1) * stride);
        columns[..stride].fill(0.0);
        let (candidates, order) = begin(row, stride, packed, weights, kept, scores, turns);
        let mut elimination = Self { inverse, columns, steps: 0, candidates, order };
        elimination.check::<S, NV>();
        // SAFETY: checked; `_simd` is the proof of the instruction set.
        unsafe { elimination.settle::<S, NV>([S::zero(); NV], [S::zero(); NV], 0.0, 0.0) };
        elimination
    }

    /// Check what the pointers below need: rows of `NV` vectors.
    #[inline(always)]
    fn check<S: Simd<T = f64>, const NV: usize>(&self) {
        let (n, size) = (NV * S::W, self.order.len());
        let Candidates { theta, diagonal, out, costs, .. } = &self.candidates;
        assert!(n <= ROW && size <= n);
        assert!(theta.len() == n && diagonal.len() == n && out.len() == n && costs.len() == n);
        assert!(self.inverse.len() == size * n && self.columns.len() == (size + 1) * n);
    }

    /// Remove a weight; return whether any was left.
    #[inline(always)]
    fn step<S: Simd<T = f64>, const NV: usize>(&mut self, simd: S) -> bool {
        if self.order.is_complete() {
            return false;
        }
        let n = NV * S::W;
        assert!(self.candidates.theta.len() == n);
        let (cost, at) = self.cheapest::<S, NV>(simd);
        self.order.remove(at, cost);
        let inverse = 1.0 / self.candidates.diagonal[at].max(f64::MIN_POSITIVE);
        let theta_at = self.candidates.theta[at];
        // SAFETY: `check` has checked the lengths; `at` is a row of the matrix, `steps` one of the
        // columns with one more after it. `simd` is the proof of the instruction set.
        unsafe {
            let (mut even, mut odd) = ([S::zero(); NV], [S::zero(); NV]);
            let mut row = self.columns.as_ptr();
            // By twos: after the column of the last step there is a row of zeros.
            for _ in 0..self.steps.div_ceil(2) {
                let factor = S::splat(row.add(at));
                for v in 0..NV {
                    even[v] = S::mul_add(factor, S::load(row.add(v * S::W)), even[v]);
                }
                let factor = S::splat(row.add(n + at));
                for v in 0..NV {
                    odd[v] = S::mul_add(factor, S::load(row.add(n + v * S::W)), odd[v]);
                }
                row = row.add(2 * n);
            }
            let minus = -1.0;
            let minus = S::splat(&raw const minus);
            let from = self.inverse.as_ptr().add(at * n);
            let root = inverse.sqrt();
            let (root, to) = (S::splat(&raw const root), self.columns.as_mut_ptr());
            let (column, after) = (to.add(self.steps * n), to.add((self.steps + 1) * n));
            for v in 0..NV {
                let known = S::add(even[v], odd[v]);
                even[v] = S::mul_add(minus, known, S::load(from.add(v * S::W)));
                S::store(column.add(v * S::W), S::mul(even[v], root));
                S::store(after.add(v * S::W), S::zero());
                odd[v] = S::load(OUT.as_ptr().add(ROW - at + v * S::W));
            }
            self.settle::<S, NV>(even, odd, theta_at, inverse);
        }
        self.steps += 1;
        true
    }

    /// Find the least cost and the first weight that has it.
    #[inline(always)]
    fn cheapest<S: Simd<T = f64>, const NV: usize>(&self, _simd: S) -> (f64, usize) {
        let (least, wanted, value) = self.candidates.least();
        let wanted = wanted.as_ptr();
        let mut found = 0u64;
        for v in 0..NV {
            // SAFETY: the row holds `NV` vectors (`check`); `_simd` is the proof.
            let bits =
                unsafe { S::equal(S::load(wanted.add(v * S::W)), S::splat(&raw const value)) };
            found |= u64::from(bits) << (v * S::W);
        }
        (least, found.trailing_zeros() as usize)
    }

    /// Add `out` to the costs, move the other weights along `column`, downdate the diagonal, and
    /// price the rest.
    ///
    /// # Safety
    /// All rows are checked ([`Elimination::check`]), and the processor has the instruction set.
    #[inline(always)]
    unsafe fn settle<S: Simd<T = f64>, const NV: usize>(
        &mut self,
        column: [S::V; NV],
        out: [S::V; NV],
        theta_at: f64,
        inverse: f64,
    ) {
        let Candidates { theta, diagonal, out: gone, costs, least } = &mut self.candidates;
        let (theta, diagonal) = (theta.as_mut_ptr(), diagonal.as_mut_ptr());
        let (gone, costs) = (gone.as_mut_ptr(), costs.as_mut_ptr());
        // SAFETY: each row holds `NV` vectors.
        unsafe {
            let splat = |x: f64| S::splat(&raw const x);
            let (tiny, infinity) = (splat(f64::MIN_POSITIVE), splat(f64::INFINITY));
            let (slope, minus) = (splat(-theta_at * inverse), splat(-inverse));
            let mut smallest = infinity;
            for v in 0..NV {
                let at = v * S::W;
                let (h, d) = (column[v], S::load(diagonal.add(at)));
                let t = S::mul_add(slope, h, S::load(theta.add(at)));
                let d = S::max(S::mul_add(S::mul(h, minus), h, d), tiny);
                let gone_now = S::add(S::load(gone.add(at)), out[v]);
                let cost = S::add(S::div(S::mul(t, t), S::add(d, d)), gone_now);
                S::store(theta.add(at), t);
                S::store(diagonal.add(at), d);
                S::store(gone.add(at), gone_now);
                S::store(costs.add(at), cost);
                smallest = S::min(cost, smallest);
            }
            *least = [f64::INFINITY; MOST_LANES];
            S::store(least.as_mut_ptr(), smallest);
        }
    }
}
