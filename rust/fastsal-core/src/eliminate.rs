//! Greedy elimination (Optimal Brain Surgeon, Hassibi & Stork 1993, one weight at a time).
//!
//! In each block: remove the weight with the least cost `θ_j² / (2 H_jj)`, `H = A⁻¹`; move the others
//! by `-H e_j θ_j / H_jj`; strike row and column `j` from `H` (a rank-one downdate); repeat. The
//! downdates are those of a Cholesky factorisation of `H` whose pivots the costs choose, so the
//! current column `j` is `H_:j - sum_s v_s v_s[j]` with `v_s` the scaled columns of the steps before:
//! one load for a product, no store, and the matrix itself is never written.

use rayon::prelude::*;

use crate::dense::{cholesky, inverse_packed, invert, subtract_row, unpack, zeros, Scratch};
use crate::error::{check_length, Result};
use crate::factor::{check_damping, Statistics};
use crate::gram::padded;
use crate::layout::triangle;
use crate::parallel;
use crate::simd::{dispatch, Isa, Kernel, Real, Simd};

/// Costs and turns of all weights of a parameter.
///
/// `scores[j]` is the running maximum of the elimination costs of `j`'s block up to its turn, so
/// that one threshold over all blocks cuts each at a prefix of its own order; `turns[j]` is `j`'s
/// place in that order. A weight that is pruned already has score `-inf` and turn 0. Returns the
/// blocks that could not be factored; their scores are NaN.
///
/// # Errors
/// [`crate::Error::Length`] and [`crate::Error::Value`] for arguments that do not fit.
pub fn eliminate<T: Real>(
    statistics: Statistics<'_, T>,
    weights: &[f32],
    damping: f64,
    scores: &mut [f32],
    turns: &mut [u32],
) -> Result<Vec<usize>> {
    statistics.check()?;
    check_damping(damping)?;
    let layout = statistics.layout;
    check_length("weights", weights.len(), layout.len)?;
    check_length("scores", scores.len(), layout.len)?;
    check_length("turns", turns.len(), layout.len)?;
    let isa = Isa::best();
    let fine: Vec<bool> = parallel::run(|| {
        scores
            .par_chunks_mut(layout.block)
            .zip(turns.par_chunks_mut(layout.block))
            .zip(weights.par_chunks(layout.block))
            .enumerate()
            .map_init(Scratch::default, |scratch, (b, ((scores, turns), weights))| {
                dispatch(isa, Block { statistics, b, weights, damping, scores, turns, scratch })
            })
            .collect()
    });
    Ok(fine.iter().enumerate().filter(|(_, fine)| !**fine).map(|(b, _)| b).collect())
}

/// One block; whether it could be factored.
struct Block<'a, T> {
    statistics: Statistics<'a, T>,
    b: usize,
    weights: &'a [f32],
    damping: f64,
    scores: &'a mut [f32],
    turns: &'a mut [u32],
    scratch: &'a mut Scratch,
}

impl<T: Real> Kernel<f64> for Block<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self) -> bool {
        let Self { statistics, b, weights, damping, scores, turns, scratch } = self;
        let size = weights.len();
        let stride = padded(size);
        let a = zeros(&mut scratch.upper, size * stride);
        let m = zeros(&mut scratch.lower, size * stride);
        statistics.damped(b, damping, a);
        if !cholesky::<S>(a, size) {
            scores.fill(f32::NAN);
            return false;
        }
        invert::<S>(a, m, size, |_| ());
        let packed = zeros(&mut scratch.packed, triangle(size));
        inverse_packed::<S>(m, size, packed);
        // The factors are used up: their memory takes the inverse and the scaled columns.
        let (inverse, columns) = (a, m);
        unpack(packed, size, inverse, stride);

        let row = zeros(&mut scratch.row, 2 * stride);
        let (theta, diagonal) = row.split_at_mut(stride);
        for (j, w) in weights.iter().enumerate() {
            theta[j] = f64::from(*w);
            diagonal[j] = inverse[j * stride + j];
        }
        // A weight that is out has an infinite cost.
        let mut out = vec![false; size];
        let mut first = 0;
        if let Some(kept) = statistics.kept_in(b) {
            for j in (0..size).filter(|j| !kept[*j]) {
                out[j] = true;
                scores[j] = f32::NEG_INFINITY;
                turns[j] = 0;
                first += 1;
            }
        }
        let mut highest = 0.0f64;
        for step in first..size {
            let mut best = (f64::INFINITY, size);
            for j in (0..size).filter(|j| !out[*j]) {
                let cost = theta[j] * theta[j] / (2.0 * diagonal[j]);
                if cost < best.0 || best.1 == size {
                    best = (cost, j);
                }
            }
            let (cost, j) = best;
            highest = highest.max(cost);
            scores[j] = highest as f32;
            turns[j] = step as u32;
            out[j] = true;

            let done = step - first;
            let (earlier, column) = columns.split_at_mut(done * stride);
            let column = &mut column[..stride];
            column.copy_from_slice(&inverse[j * stride..(j + 1) * stride]);
            if done > 0 {
                subtract_row::<S>(column, earlier, stride, done, &earlier[j..], stride);
            }
            let pivot = column[j].max(f64::MIN_POSITIVE);
            let (move_by, scale) = (theta[j] / pivot, 1.0 / pivot.sqrt());
            for ((theta, diagonal), h) in theta.iter_mut().zip(diagonal.iter_mut()).zip(column) {
                *theta -= move_by * *h;
                *h *= scale;
                *diagonal = (*diagonal - *h * *h).max(f64::MIN_POSITIVE);
            }
        }
        true
    }
}
