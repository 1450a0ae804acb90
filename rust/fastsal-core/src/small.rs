//! Greedy elimination of blocks of a few vectors, where gathering a column and finding the least
//! cost take longer than the arithmetic: `H` is kept whole, so that a column is a row, and its columns
//! are kept apart to the end.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use crate::dense::{room, unpack, zeros, Scratch};
use crate::simd::{Kernel, Simd};
use crate::tiles::padded;

/// The largest block that is walked through here.
pub(crate) const LARGEST: usize = 48;

/// Lanes of the longest row: [`LARGEST`] padded to whole vectors.
const LANES: usize = padded(LARGEST);

/// The most lanes of a vector.
const WIDEST: usize = 8;

/// Infinity in the middle of zeros: a window that begins at `LANES - j` has it in lane `j`.
static OUT: [f64; 2 * LANES] = {
    let mut out = [0.0; 2 * LANES];
    out[LANES] = f64::INFINITY;
    out
};

/// The smaller one, or `b` if that cannot be said: a single instruction.
#[inline(always)]
pub(crate) fn smaller(a: f64, b: f64) -> f64 {
    if a < b {
        a
    } else {
        b
    }
}

/// What a walk begins with: the inverse is in `scratch.packed`.
pub(crate) struct Block<'a> {
    pub scratch: &'a mut Scratch,
    pub weights: &'a [f32],
    /// Weights that are not kept go first, for nothing.
    pub kept: Option<&'a [bool]>,
    pub scores: &'a mut [f32],
    pub turns: &'a mut [u32],
}

/// Small blocks that are walked through side by side.
pub(crate) struct Abreast<'a, const N: usize> {
    pub blocks: [Option<Block<'a>>; N],
}

impl<const N: usize> Kernel<f64> for Abreast<'_, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self) {
        let sizes = self.blocks.iter().flatten().map(|block| block.weights.len());
        // Of a portable vector 24 make the largest block, of AVX2 12, of AVX-512 6.
        match sizes.max().unwrap_or(0).div_ceil(S::W) {
            0 | 1 => self.walk::<S, 1>(),
            2 => self.walk::<S, 2>(),
            3 => self.walk::<S, 3>(),
            4 => self.walk::<S, 4>(),
            5 => self.walk::<S, 5>(),
            6 => self.walk::<S, 6>(),
            7 | 8 => self.walk::<S, 8>(),
            9..=12 => self.walk::<S, 12>(),
            _ => self.walk::<S, 24>(),
        }
    }
}

impl<const N: usize> Abreast<'_, N> {
    /// Blocks of at most `NV` vectors.
    #[inline(always)]
    fn walk<S: Simd<T = f64>, const NV: usize>(self) {
        if NV * S::W > LANES {
            return; // never: it is here so that nothing is compiled for it
        }
        let mut walks = self.blocks.map(|block| block.map(Walk::new::<S, NV>));
        let mut busy = true;
        while busy {
            busy = false;
            for walk in walks.iter_mut().flatten() {
                busy |= walk.step::<S, NV>();
            }
        }
    }
}

/// A small block on its way. All rows are `stride` long.
struct Walk<'a> {
    stride: usize,
    /// `H`, all of it.
    inverse: &'a [f64],
    /// For each step the column over the root of its pivot, and a row of zeros.
    columns: &'a mut [f64],
    theta: &'a mut [f64],
    /// `H_jj`, downdated.
    diagonal: &'a mut [f64],
    /// Added to the costs: zero, or infinity for a weight that is out.
    out: &'a mut [f64],
    costs: &'a mut [f64],
    /// The least cost of each lane.
    least: [f64; WIDEST],
    steps: usize,
    turn: usize,
    highest: f64,
    scores: &'a mut [f32],
    turns: &'a mut [u32],
}

impl<'a> Walk<'a> {
    #[inline(always)]
    fn new<S: Simd<T = f64>, const NV: usize>(block: Block<'a>) -> Self {
        let Block { scratch, weights, kept, scores, turns } = block;
        let size = weights.len();
        let stride = NV * S::W;
        assert!(size <= stride && stride <= LANES);
        let inverse = room(&mut scratch.upper, size * stride);
        unpack(&scratch.packed[..size * (size + 1) / 2], size, inverse, stride);
        let columns = room(&mut scratch.lower, (size + 1) * stride);
        columns[..stride].fill(0.0);
        let (theta, rest) = zeros(&mut scratch.row, 4 * stride).split_at_mut(stride);
        let (diagonal, rest) = rest.split_at_mut(stride);
        let (out, costs) = rest.split_at_mut(stride);
        diagonal[size..].fill(1.0);
        out[size..].fill(f64::INFINITY);
        let mut turn = 0;
        for (j, w) in weights.iter().enumerate() {
            // Columns beyond the last are read, but no weight is there.
            inverse[j * stride + size..(j + 1) * stride].fill(0.0);
            theta[j] = f64::from(*w);
            diagonal[j] = inverse[j * stride + j];
            if kept.is_some_and(|kept| !kept[j]) {
                out[j] = f64::INFINITY;
                scores[j] = f32::NEG_INFINITY;
                turns[j] = 0;
                turn += 1;
            }
        }
        let least = [f64::INFINITY; WIDEST];
        let (steps, highest) = (0, 0.0);
        let mut walk = Self {
            stride,
            inverse,
            columns,
            theta,
            diagonal,
            out,
            costs,
            least,
            steps,
            turn,
            highest,
            scores,
            turns,
        };
        walk.check::<S, NV>();
        // SAFETY: checked; the caller's instruction set is here.
        unsafe { walk.settle::<S, NV>([S::zero(); NV], [S::zero(); NV], 0.0, 0.0) };
        walk
    }

    /// What the pointers below need: rows of `NV` vectors.
    #[inline(always)]
    fn check<S: Simd<T = f64>, const NV: usize>(&self) {
        let n = NV * S::W;
        assert!(self.stride == n && n <= LANES && self.scores.len() <= n);
        assert!(self.theta.len() == n && self.diagonal.len() == n);
        assert!(self.out.len() == n && self.costs.len() == n);
        assert!(self.inverse.len() == self.scores.len() * n);
        assert!(self.columns.len() == (self.scores.len() + 1) * n);
    }

    /// Remove a weight; says whether any was left.
    #[inline(always)]
    fn step<S: Simd<T = f64>, const NV: usize>(&mut self) -> bool {
        if self.turn == self.scores.len() {
            return false;
        }
        assert!(self.stride == NV * S::W);
        let (cost, at) = self.cheapest::<S, NV>();
        self.highest = self.highest.max(cost);
        self.scores[at] = self.highest as f32;
        self.turns[at] = self.turn as u32;
        self.turn += 1;
        let inverse = 1.0 / self.diagonal[at].max(f64::MIN_POSITIVE);
        let (n, theta_at) = (self.stride, self.theta[at]);
        // SAFETY: the lengths were checked at the start; `at` is a row of the matrix, `steps` one of the columns
        // with one more after it.
        unsafe {
            let (mut even, mut odd) = ([S::zero(); NV], [S::zero(); NV]);
            let mut row = self.columns.as_ptr();
            // By twos: after the last step's column there is a row of zeros.
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
                odd[v] = S::load(OUT.as_ptr().add(LANES - at + v * S::W));
            }
            self.settle::<S, NV>(even, odd, theta_at, inverse);
        }
        self.steps += 1;
        true
    }

    /// The least cost and the first place that has it.
    #[inline(always)]
    fn cheapest<S: Simd<T = f64>, const NV: usize>(&self) -> (f64, usize) {
        let mut least = self.least;
        let mut width = WIDEST / 2;
        while width > 0 {
            for lane in 0..width {
                least[lane] = smaller(least[lane + width], least[lane]);
            }
            width /= 2;
        }
        let least = least[0];
        // Costs that overflow are all alike: any weight that is not out will do.
        let (wanted, value) = if least < f64::INFINITY {
            (self.costs.as_ptr(), least)
        } else {
            (self.out.as_ptr(), 0.0)
        };
        let mut found = 0u64;
        for v in 0..NV {
            // SAFETY: both hold `NV` vectors (`check`); the instruction set is here.
            let bits =
                unsafe { S::equal(S::load(wanted.add(v * S::W)), S::splat(&raw const value)) };
            found |= u64::from(bits) << (v * S::W);
        }
        (least, found.trailing_zeros() as usize)
    }

    /// Take `out` out, move the other weights along `column`, downdate the diagonal, and price what
    /// is left.
    ///
    /// # Safety
    /// All rows are [`Walk::check`]ed, and the instruction set is here.
    #[inline(always)]
    unsafe fn settle<S: Simd<T = f64>, const NV: usize>(
        &mut self,
        column: [S::V; NV],
        out: [S::V; NV],
        theta_at: f64,
        inverse: f64,
    ) {
        let (theta, diagonal) = (self.theta.as_mut_ptr(), self.diagonal.as_mut_ptr());
        let (gone, costs) = (self.out.as_mut_ptr(), self.costs.as_mut_ptr());
        // SAFETY: each row holds `NV` vectors.
        unsafe {
            let splat = |x: f64| S::splat(&raw const x);
            let (tiny, infinity) = (splat(f64::MIN_POSITIVE), splat(f64::INFINITY));
            let (slope, minus) = (splat(-theta_at * inverse), splat(-inverse));
            let mut least = infinity;
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
                least = S::min(cost, least);
            }
            self.least = [f64::INFINITY; WIDEST];
            S::store(self.least.as_mut_ptr(), least);
        }
    }
}
