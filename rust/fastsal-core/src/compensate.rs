//! Joint compensation: the exact minimizer of `δᵀ A δ / 2` under `θ_P = 0`, for any mask.
//!
//! `θ_K ← θ_K + A_KK⁻¹ A_KP θ_P`, and the predicted loss increase is
//! `(θ_Pᵀ A_PP θ_P - rᵀ A_KK⁻¹ r) / 2` with `r = A_KP θ_P`. Weights that were pruned before belong to
//! neither set.

use crate::parallel::prelude::*;

use crate::cholesky::{cholesky, dot, solve};
use crate::error::{check_length, check_weights, Result};
use crate::isa::Isa;
use crate::parallel;
use crate::scratch::{Failure, Scratch};
use crate::simd::{dispatch, padded, Kernel, Simd};
use crate::statistics::{positions, Damped};

/// Outcome of the compensation of one parameter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Compensation {
    /// Predicted loss increase of each block, `δᵀ A δ / 2`, after compensation.
    pub increase: Vec<f64>,
    /// The same without moving any kept weight, `θ_Pᵀ A_PP θ_P / 2`.
    pub uncompensated: Vec<f64>,
    /// Blocks that are not positive definite in double precision; their weights are only masked.
    pub failed: Vec<usize>,
}

/// Prune `weights` to `mask` (true = kept) in place and move the kept ones to compensate.
///
/// Weights that were pruned before the statistics were collected stay pruned. A block of which nothing
/// is pruned now is not factored, and so does not fail.
///
/// # Errors
/// [`crate::Error::Length`] for arrays that do not fit, [`crate::Error::NonFiniteWeight`], and
/// [`crate::Error::Memory`].
pub fn compensate(damped: Damped<'_>, weights: &mut [f32], mask: &[bool]) -> Result<Compensation> {
    let (isa, layout) = (Isa::chosen()?, damped.layout());
    check_length("weights", weights.len(), layout.len())?;
    check_length("mask", mask.len(), layout.len())?;
    check_weights(weights)?;
    let failure = Failure::default();
    let blocks: Vec<(f64, f64, bool)> = parallel::run(|| {
        weights
            .par_chunks_mut(layout.block())
            .zip(mask.par_chunks(layout.block()))
            .enumerate()
            .map_init(Workspace::default, |workspace, (b, (weights, mask))| {
                if !failure.check(workspace.scratch.reserve(weights.len(), layout.blocks())) {
                    return (0.0, 0.0, false);
                }
                let kept = damped.kept_in(b);
                workspace.divide(mask, kept);
                let found = if workspace.pruned.is_empty() {
                    (0.0, 0.0, true)
                } else {
                    dispatch(isa, Block { damped, b, weights: &mut *weights, workspace })
                };
                for (weight, _) in weights.iter_mut().zip(mask).filter(|(_, kept)| !**kept) {
                    *weight = 0.0;
                }
                found
            })
            .collect()
    });
    failure.or(Compensation {
        increase: blocks.iter().map(|b| b.0).collect(),
        uncompensated: blocks.iter().map(|b| b.1).collect(),
        failed: positions(&blocks, |b| !b.2),
    })
}

/// A worker's memory.
#[derive(Default)]
struct Workspace {
    scratch: Scratch,
    /// Places of the weights that are kept, and of those that are pruned now.
    kept: Vec<usize>,
    pruned: Vec<usize>,
}

impl Workspace {
    /// Tell kept from pruned weights, of those that were `kept` before.
    fn divide(&mut self, mask: &[bool], kept: Option<&[bool]>) {
        self.kept.clear();
        self.pruned.clear();
        for (j, stays) in mask.iter().enumerate() {
            if kept.is_none_or(|kept| kept[j]) {
                if *stays { &mut self.kept } else { &mut self.pruned }.push(j);
            }
        }
    }
}

/// One block: predicted increase with and without compensation, and whether it could be factored.
struct Block<'a> {
    damped: Damped<'a>,
    b: usize,
    weights: &'a mut [f32],
    workspace: &'a mut Workspace,
}

impl Kernel<f64> for Block<'_> {
    type Output = (f64, f64, bool);

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) -> Self::Output {
        let Self { damped, b, weights, workspace } = self;
        let Workspace { scratch: Scratch { upper, lower, row, panels, .. }, kept, pruned } =
            workspace;
        let size = weights.len();
        let stride = padded(size);
        let a = upper.room(size * stride);
        damped.write(b, a);

        // A θ, for θ that is zero where not pruned: its entries at P determine the loss without
        // compensation, those at K the step.
        let (theta, rest) = row.zeros(4 * stride).split_at_mut(stride);
        let (product, rest) = rest.split_at_mut(stride);
        let (step, known) = rest.split_at_mut(stride);
        for p in &*pruned {
            theta[*p] = f64::from(weights[*p]);
        }
        for i in 0..size {
            let row = &a[i * stride + i..i * stride + size];
            product[i] += dot(row, &theta[i..size]);
            if theta[i] != 0.0 {
                for (y, x) in product[i + 1..size].iter_mut().zip(&row[1..]) {
                    *y += x * theta[i];
                }
            }
        }
        let bare = dot(theta, product) / 2.0;
        let (step, known) = (&mut step[..kept.len()], &mut known[..kept.len()]);
        for (x, k) in step.iter_mut().zip(&*kept) {
            *x = product[*k];
        }
        known.copy_from_slice(step);

        let inner = padded(kept.len());
        let a_kk = lower.room(kept.len() * inner);
        for (i, k) in kept.iter().enumerate() {
            let row = &a[k * stride..k * stride + size];
            for (to, l) in a_kk[i * inner + i..].iter_mut().zip(&kept[i..]) {
                *to = row[*l];
            }
        }
        let fine = cholesky(simd.isa(), a_kk, kept.len(), panels) && bare.is_finite();
        let mut increase = bare;
        if fine {
            solve(a_kk, kept.len(), step);
            increase -= dot(known, step) / 2.0;
            for (k, x) in kept.iter().zip(&*step) {
                weights[*k] = (f64::from(weights[*k]) + x) as f32;
            }
        }
        (increase.max(0.0), bare, fine)
    }
}

#[cfg(test)]
mod tests;
