//! Greedy elimination (Optimal Brain Surgeon, Hassibi & Stork 1993, one weight at a time).
//!
//! In each block: remove the weight with the least cost `θ_j² / (2 H_jj)`, `H = A⁻¹`; move the others
//! by `-H e_j θ_j / H_jj`; delete row and column `j` from `H` (a rank-one downdate); repeat. The
//! downdates are those of a Cholesky factorization of `H` whose pivots the costs select, so the
//! current column `j` is `h_j = H_:j - sum_s h_s h_s[j] / p_s`, with `h_s` the columns of the earlier
//! steps and `p_s` their pivots. Small and large blocks share everything
//! except how they compute that column.

use crate::parallel::prelude::*;

use crate::error::{check_length, check_weights, Result};
use crate::greedy_large::Large;
use crate::greedy_small::{Small, LARGEST_SMALL};
use crate::greedy_state::Block;
use crate::isa::Isa;
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
    let in_turns = if block <= IN_TURNS_UP_TO { IN_TURNS } else { 1 };
    let mut sensitivities: Vec<Option<f64>> = vec![None; layout.blocks()];
    let failure = Failure::default();
    parallel::run(|| {
        scores
            .par_chunks_mut(in_turns * block)
            .zip(turns.par_chunks_mut(in_turns * block))
            .zip(weights.par_chunks(in_turns * block))
            .zip(sensitivities.par_chunks_mut(in_turns))
            .enumerate()
            .for_each_init(
                <[Scratch; IN_TURNS]>::default,
                |scratches, (i, (((scores, turns), weights), sensitivities))| {
                    let parts = scores.chunks_mut(block).zip(turns.chunks_mut(block));
                    let parts = parts.zip(weights.chunks(block)).zip(sensitivities).zip(scratches);
                    let mut blocks: [Option<Block<'_>>; IN_TURNS] = Default::default();
                    for (k, ((((scores, turns), weights), sensitivity), scratch)) in
                        parts.enumerate()
                    {
                        let b = i * in_turns + k;
                        if failure.check(scratch.reserve(weights.len())) {
                            *sensitivity = damped.invert(isa, b, scratch);
                        }
                        if sensitivity.is_none() {
                            scores.fill(f32::NAN);
                            continue;
                        }
                        let kept = damped.kept_in(b);
                        blocks[k] = Some(Block { scratch, weights, kept, scores, turns });
                    }
                    if weights.len().is_multiple_of(block) {
                        remove(isa, blocks);
                    } else {
                        // How a block is processed depends on its own size alone.
                        for block in blocks {
                            remove(isa, [block, None]);
                        }
                    }
                },
            );
    });
    failure.or(sensitivities.into())
}

/// Process blocks of one size in turns.
fn remove(isa: Isa, blocks: [Option<Block<'_>>; IN_TURNS]) {
    let size = blocks.iter().flatten().map(|block| block.weights.len()).next();
    match size {
        None => {}
        Some(..=LARGEST_SMALL) => dispatch(isa, Small { blocks }),
        Some(_) => dispatch(isa, Large { blocks }),
    }
}

#[cfg(test)]
mod tests;
