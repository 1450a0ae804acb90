//! Greedy elimination (Optimal Brain Surgeon, Hassibi & Stork 1993, one weight at a time).
//!
//! In each block: remove the weight with the least cost `θ_j² / (2 H_jj)`, `H = A⁻¹`; move the others
//! by `-H e_j θ_j / H_jj`; delete row and column `j` from `H` (a rank-one downdate); repeat. The
//! downdates are those of a Cholesky factorization of `H` whose pivots the costs select, so the
//! current column `j` is `h_j = H_:j - sum_s h_s h_s[j] / p_s`, with `h_s` the columns of the earlier
//! steps and `p_s` their pivots. Small and large blocks share everything
//! except how they compute that column.

use crate::parallel::prelude::*;

use crate::error::{check_length, Result};
use crate::greedy_large::Large;
use crate::greedy_small::{Small, LARGEST_SMALL};
use crate::greedy_state::Block;
use crate::isa::Isa;
use crate::parallel;
use crate::scratch::Scratch;
use crate::simd::dispatch;
use crate::statistics::{Damped, Report};

/// Blocks that are processed in turns: each step waits for the one before it, and a step of another
/// block fills the wait. Larger blocks keep the processor busy, and fill the cache, alone.
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
/// [`crate::Error::Length`] for arrays that do not fit.
pub fn eliminate(
    damped: Damped<'_>,
    weights: &[f32],
    scores: &mut [f32],
    turns: &mut [u32],
) -> Result<Report> {
    eliminate_with(Isa::best(), damped, weights, scores, turns)
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
    let block = layout.block();
    let in_turns = if block <= IN_TURNS_UP_TO { IN_TURNS } else { 1 };
    let mut sensitivities: Vec<Option<f64>> = vec![None; layout.blocks()];
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
                    let largest = block.min(weights.len());
                    let parts = scores.chunks_mut(block).zip(turns.chunks_mut(block));
                    let parts = parts.zip(weights.chunks(block)).zip(sensitivities).zip(scratches);
                    let mut blocks: [Option<Block<'_>>; IN_TURNS] = Default::default();
                    for (k, ((((scores, turns), weights), sensitivity), scratch)) in
                        parts.enumerate()
                    {
                        let b = i * in_turns + k;
                        *sensitivity = damped.invert(isa, b, scratch);
                        if sensitivity.is_none() {
                            scores.fill(f32::NAN);
                            continue;
                        }
                        let kept = damped.kept_in(b);
                        blocks[k] = Some(Block { scratch, weights, kept, scores, turns });
                    }
                    if largest <= LARGEST_SMALL {
                        dispatch(isa, Small { blocks });
                    } else {
                        dispatch(isa, Large { blocks });
                    }
                },
            );
    });
    Ok(sensitivities.into())
}

#[cfg(test)]
mod tests;
