//! Greedy elimination (Optimal Brain Surgeon, Hassibi & Stork 1993, one weight at a time).
//!
//! In each block: remove the weight with the least cost `θ_j² / (2 H_jj)`, `H = A⁻¹`; move the others
//! by `-H e_j θ_j / H_jj`; delete row and column `j` from `H` (a rank-one downdate); repeat. The
//! downdates are those of a Cholesky factorization of `H` whose pivots the costs select, so the
//! current column `j` is `h_j = H_:j - sum_s h_s h_s[j] / p_s`, with `h_s` the columns of the earlier
//! steps and `p_s` their pivots. Small blocks are processed side by side ([`interleaved`]), large ones
//! alone.

use crate::parallel::prelude::*;

use crate::error::{check_length, check_weights, Result};
use crate::greedy_large::Large;
use crate::greedy_state::Block;
use crate::interleaved::{self, Eliminate, BLOCKS};
use crate::isa::Isa;
use crate::layout::triangle;
use crate::parallel;
use crate::scratch::{Failure, Scratch};
use crate::simd::dispatch;
use crate::statistics::{Damped, Report};

/// Blocks of one size that are processed in turns: each step waits for the one before it, and a step of
/// another block fills the wait. Larger blocks keep the processor busy, and fill the cache, alone.
const IN_TURNS: usize = 2;
const IN_TURNS_UP_TO: usize = 128;

/// Compute scores and turns of all weights of a parameter.
///
/// `scores[j]` is the running maximum of the elimination costs of the block of `j` up to its turn, so
/// that one threshold over all blocks cuts each at a prefix of its own order; `turns[j]` is the
/// position of `j` in that order. A weight that is already pruned has score `-inf` and turn 0; scores
/// of blocks that cannot be factored are NaN.
///
/// # Errors
/// [`crate::Error::Length`] for arrays that do not fit, [`crate::Error::NonFiniteWeight`], and
/// [`crate::Error::Memory`].
pub fn eliminate(
    damped: Damped<'_>,
    weights: &[f32],
    scores: &mut [f32],
    turns: &mut [u32],
) -> Result<Report> {
    eliminate_with(Isa::chosen()?, damped, weights, scores, turns)
}

fn eliminate_with(
    isa: Isa,
    damped: Damped<'_>,
    weights: &[f32],
    scores: &mut [f32],
    turns: &mut [u32],
) -> Result<Report> {
    let layout = damped.layout();
    check_length("weights", weights.len(), layout.len())?;
    check_length("scores", scores.len(), layout.len())?;
    check_length("turns", turns.len(), layout.len())?;
    check_weights(weights)?;
    let block = layout.block();
    let per_task = if block <= interleaved::LARGEST {
        BLOCKS
    } else if block <= IN_TURNS_UP_TO {
        IN_TURNS
    } else {
        1
    };
    let mut sensitivities: Vec<Option<f64>> = vec![None; layout.blocks()];
    let failure = Failure::default();
    parallel::run(|| {
        scores
            .par_chunks_mut(per_task * block)
            .zip(turns.par_chunks_mut(per_task * block))
            .zip(weights.par_chunks(per_task * block))
            .zip(sensitivities.par_chunks_mut(per_task))
            .enumerate()
            .for_each_init(
                Workspace::default,
                |workspace, (i, (((scores, turns), weights), sensitivities))| {
                    let first = i * per_task;
                    // A short last block is processed by itself: how a block is processed depends on
                    // its own size alone.
                    let (count, whole) = (weights.len() / block, weights.len() / block * block);
                    let (scores, short_scores) = scores.split_at_mut(whole);
                    let (turns, short_turns) = turns.split_at_mut(whole);
                    let (weights, short_weights) = weights.split_at(whole);
                    let (sensitivities, short) = sensitivities.split_at_mut(count);
                    let task = Task { isa, damped, first, scores, turns, weights, sensitivities };
                    failure.check(task.run(block, workspace));
                    let (scores, turns, weights) = (short_scores, short_turns, short_weights);
                    let (first, sensitivities) = (first + count, short);
                    let size = weights.len();
                    let task = Task { isa, damped, first, scores, turns, weights, sensitivities };
                    failure.check(task.run(size, workspace));
                },
            );
    });
    failure.or(sensitivities.into())
}

/// A worker's memory.
#[derive(Default)]
struct Workspace {
    /// Of large blocks.
    scratches: [Scratch; IN_TURNS],
    /// Of small ones.
    memory: interleaved::Memory,
}

/// A few neighboring blocks of one size, the first of them `first`.
struct Task<'a> {
    isa: Isa,
    damped: Damped<'a>,
    first: usize,
    scores: &'a mut [f32],
    turns: &'a mut [u32],
    weights: &'a [f32],
    sensitivities: &'a mut [Option<f64>],
}

impl Task<'_> {
    fn run(self, size: usize, workspace: &mut Workspace) -> Result<()> {
        if self.sensitivities.is_empty() {
            return Ok(());
        }
        if size > interleaved::LARGEST {
            return self.run_large(size, &mut workspace.scratches);
        }
        let Self { isa, damped, first: b, scores, turns, weights, sensitivities } = self;
        let memory = &mut workspace.memory;
        let found = dispatch(isa, Eliminate { damped, b, size, memory, weights, scores, turns });
        sensitivities.copy_from_slice(&found[..sensitivities.len()]);
        Ok(())
    }

    /// Invert large blocks one after the other, and process them in turns.
    fn run_large(self, size: usize, scratches: &mut [Scratch; IN_TURNS]) -> Result<()> {
        let Self { isa, damped, first, scores, turns, weights, sensitivities } = self;
        let parts = scores.chunks_mut(size).zip(turns.chunks_mut(size));
        let parts = parts.zip(weights.chunks(size)).zip(sensitivities).zip(scratches);
        let mut blocks: [Option<Block<'_>>; IN_TURNS] = Default::default();
        for (k, ((((scores, turns), weights), sensitivity), scratch)) in parts.enumerate() {
            scratch.reserve(size, damped.layout().blocks())?;
            *sensitivity = damped.invert(isa, first + k, scratch);
            if sensitivity.is_none() {
                scores.fill(f32::NAN);
                continue;
            }
            let Scratch { upper, row, packed, .. } = scratch;
            let inverse = &mut packed[..triangle(size)];
            let kept = damped.kept_in(first + k);
            blocks[k] = Some(Block { upper, row, inverse, weights, kept, scores, turns });
        }
        dispatch(isa, Large { blocks });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
