//! What the elimination of a block keeps: candidates, their costs, and the order in which they are
//! removed.

use crate::layout::row_base;
use crate::memory::Aligned;

/// Lanes of the widest vector of doubles.
pub(crate) const MOST_LANES: usize = 8;

/// A block to be processed.
pub(crate) struct Block<'a> {
    /// Memory for a matrix and a few rows of it.
    pub upper: &'a mut Aligned<f64>,
    pub row: &'a mut Aligned<f64>,
    /// Its inverse `H`, which is overwritten.
    pub inverse: &'a mut [f64],
    pub weights: &'a [f32],
    /// Weights that are not kept are removed first, at no cost.
    pub kept: Option<&'a [bool]>,
    pub scores: &'a mut [f32],
    pub turns: &'a mut [u32],
}

/// The weights of a block and what their removal costs, in rows of whole vectors.
pub(crate) struct Candidates<'a> {
    pub theta: &'a mut [f64],
    /// `H_jj`, downdated.
    pub diagonal: &'a mut [f64],
    /// Added to the costs: zero, or infinity for a weight that is removed or padding.
    pub out: &'a mut [f64],
    pub costs: &'a mut [f64],
    /// The least cost of each lane.
    pub least: [f64; MOST_LANES],
}

/// The order of removal so far.
pub(crate) struct Order<'a> {
    turn: usize,
    highest: f64,
    scores: &'a mut [f32],
    turns: &'a mut [u32],
}

/// Begin with a block: its candidates in `memory`, in rows of `stride`, and the order of the weights
/// that are already pruned.
pub(crate) fn begin<'a>(
    memory: &'a mut Aligned<f64>,
    stride: usize,
    packed: &[f64],
    weights: &[f32],
    kept: Option<&[bool]>,
    scores: &'a mut [f32],
    turns: &'a mut [u32],
) -> (Candidates<'a>, Order<'a>) {
    let size = weights.len();
    let (theta, rest) = memory.zeros(4 * stride).split_at_mut(stride);
    let (diagonal, rest) = rest.split_at_mut(stride);
    let (out, costs) = rest.split_at_mut(stride);
    for (j, w) in weights.iter().enumerate() {
        theta[j] = f64::from(*w);
        diagonal[j] = packed[row_base(size, j) + j];
    }
    diagonal[size..].fill(1.0);
    out[size..].fill(f64::INFINITY);
    let order = Order::new(kept, scores, turns);
    for j in (0..size).filter(|j| order.is_removed(*j)) {
        out[j] = f64::INFINITY;
    }
    let least = [f64::INFINITY; MOST_LANES];
    (Candidates { theta, diagonal, out, costs, least }, order)
}

impl Candidates<'_> {
    /// Find the least cost; the candidates that have it are those whose entry in the returned row
    /// equals the returned value.
    #[inline(always)]
    pub(crate) fn least(&self) -> (f64, &[f64], f64) {
        let mut least = self.least;
        let mut width = MOST_LANES / 2;
        while width > 0 {
            for lane in 0..width {
                least[lane] = smaller(least[lane + width], least[lane]);
            }
            width /= 2;
        }
        if least[0] < f64::INFINITY {
            (least[0], &*self.costs, least[0])
        } else {
            // Costs that overflow are all alike: any weight that is not removed is as good.
            (least[0], &*self.out, 0.0)
        }
    }
}

impl<'a> Order<'a> {
    /// Begin with the weights that are not kept, which are removed already.
    pub(crate) fn new(kept: Option<&[bool]>, scores: &'a mut [f32], turns: &'a mut [u32]) -> Self {
        scores.fill(0.0);
        let mut turn = 0;
        if let Some(kept) = kept {
            for j in (0..scores.len()).filter(|j| !kept[*j]) {
                scores[j] = f32::NEG_INFINITY;
                turns[j] = 0;
                turn += 1;
            }
        }
        Self { turn, highest: 0.0, scores, turns }
    }

    /// Number of weights in the block.
    pub(crate) fn len(&self) -> usize {
        self.scores.len()
    }

    /// Number of weights that are not removed yet.
    #[inline(always)]
    pub(crate) fn left(&self) -> usize {
        self.scores.len() - self.turn
    }

    /// Whether weight `j` was removed before the elimination.
    pub(crate) fn is_removed(&self, j: usize) -> bool {
        self.scores[j] == f32::NEG_INFINITY
    }

    /// Record that weight `j` is removed next.
    #[inline(always)]
    pub(crate) fn remove(&mut self, j: usize, cost: f64) {
        self.highest = self.highest.max(cost);
        self.scores[j] = self.highest as f32;
        self.turns[j] = self.turn as u32;
        self.turn += 1;
    }
}

/// The smaller one, or `b` where either is NaN: a single instruction.
#[inline(always)]
fn smaller(a: f64, b: f64) -> f64 {
    if a < b {
        a
    } else {
        b
    }
}
