//! Joint compensation: the exact minimizer of `δᵀ A δ / 2` under `θ_P = 0`, for any mask.
//!
//! `θ_K ← θ_K + A_KK⁻¹ A_KP θ_P`, and the predicted loss increase is
//! `(θ_Pᵀ A_PP θ_P - rᵀ A_KK⁻¹ r) / 2` with `r = A_KP θ_P`. Weights that were pruned before belong to
//! neither set.

use crate::parallel::prelude::*;

use crate::cholesky::{cholesky, solve};
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
/// Weights that were pruned before the statistics were collected stay pruned.
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
            .map_init(Scratch::default, |scratch, (b, (weights, mask))| {
                if !failure.check(scratch.reserve(weights.len())) {
                    return (0.0, 0.0, false);
                }
                dispatch(isa, Block { damped, b, weights, mask, scratch })
            })
            .collect()
    });
    failure.or(Compensation {
        increase: blocks.iter().map(|b| b.0).collect(),
        uncompensated: blocks.iter().map(|b| b.1).collect(),
        failed: positions(&blocks, |b| !b.2),
    })
}

/// One block: predicted increase with and without compensation, and whether it could be factored.
struct Block<'a> {
    damped: Damped<'a>,
    b: usize,
    weights: &'a mut [f32],
    mask: &'a [bool],
    scratch: &'a mut Scratch,
}

impl Kernel<f64> for Block<'_> {
    type Output = (f64, f64, bool);

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) -> Self::Output {
        let Self { damped, b, weights, mask, scratch } = self;
        let size = weights.len();
        let stride = padded(size);
        let before = damped.kept_in(b);
        let was_kept = |j: usize| before.is_none_or(|k| k[j]);
        let kept: Vec<usize> = (0..size).filter(|j| mask[*j] && was_kept(*j)).collect();
        let pruned: Vec<usize> = (0..size).filter(|j| !mask[*j] && was_kept(*j)).collect();
        let a = scratch.upper.room(size * stride);
        damped.write(b, a);
        let at = |i: usize, j: usize| a[i.min(j) * stride + i.max(j)];
        let theta = |j: usize| f64::from(weights[j]);

        // A_:P θ_P: the rows of P determine the loss without compensation, those of K the step.
        let product =
            |i: usize| -> f64 { pruned.iter().map(|p| at(i, *p) * theta(*p)).sum::<f64>() };
        let bare: f64 = pruned.iter().map(|p| theta(*p) * product(*p)).sum::<f64>() / 2.0;
        let mut step: Vec<f64> = kept.iter().map(|k| product(*k)).collect();
        let rhs = step.clone();

        let inner = padded(kept.len());
        let a_kk = scratch.lower.room((kept.len() * inner).max(1));
        for (i, k) in kept.iter().enumerate() {
            for (j, l) in kept.iter().enumerate().skip(i) {
                a_kk[i * inner + j] = at(*k, *l);
            }
        }
        let fine = cholesky(simd.isa(), a_kk, kept.len()) && bare.is_finite();
        let mut increase = bare;
        if fine {
            solve(a_kk, kept.len(), &mut step);
            increase -= rhs.iter().zip(&step).map(|(r, x)| r * x).sum::<f64>() / 2.0;
            for (k, x) in kept.iter().zip(&step) {
                weights[*k] = (f64::from(weights[*k]) + x) as f32;
            }
        }
        for j in (0..size).filter(|j| !mask[*j]) {
            weights[j] = 0.0;
        }
        (increase.max(0.0), bare, fine)
    }
}
