//! Inverses of the damped blocks `A_b = F_b + λ I`, and the diagonals of the inverses.

use crate::parallel::prelude::*;

use crate::error::{check_length, Result};
use crate::isa::Isa;
use crate::layout::{triangle, Layout};
use crate::parallel;
use crate::scratch::{unpack, Failure, Scratch};
use crate::simd::{dispatch, padded, Kernel, Simd};
use crate::statistics::{Damped, Report};

/// Write `diag(A⁻¹)` of every block to `out` (`[d]`), without forming the inverse.
///
/// # Errors
/// [`crate::Error::Length`] when `out` does not fit; [`crate::Error::Memory`].
pub fn inverse_diagonal(damped: Damped<'_>, out: &mut [f64]) -> Result<Report> {
    let (isa, layout) = (Isa::chosen()?, damped.layout());
    check_length("out", out.len(), layout.len())?;
    for_each_block(layout, out, layout.block(), |scratch, b, out| {
        dispatch(isa, Diagonal { damped, b, scratch, out })
    })
}

/// Write `A⁻¹` of every block to `out` (`[blocks, B, B]`, a short last block padded with zeros).
///
/// # Errors
/// [`crate::Error::Length`] when `out` does not fit; [`crate::Error::Memory`].
pub fn inverse(damped: Damped<'_>, out: &mut [f64]) -> Result<Report> {
    let (isa, layout) = (Isa::chosen()?, damped.layout());
    check_length("out", out.len(), layout.dense_len())?;
    for_each_block(layout, out, layout.block() * layout.block(), |scratch, b, out| {
        let sensitivity = damped.invert(isa, b, scratch)?;
        let size = layout.size(b);
        out.fill(0.0);
        unpack(&scratch.packed[..triangle(size)], size, out, layout.block());
        Some(sensitivity)
    })
}

/// Run `job` for every block and its part of `out`; NaN where `job` returns `None`.
fn for_each_block(
    layout: Layout,
    out: &mut [f64],
    out_per_block: usize,
    job: impl Fn(&mut Scratch, usize, &mut [f64]) -> Option<f64> + Sync + Send,
) -> Result<Report> {
    let failure = Failure::default();
    let sensitivities: Vec<Option<f64>> = parallel::run(|| {
        out.par_chunks_mut(out_per_block)
            .enumerate()
            .map_init(Scratch::default, |scratch, (b, out)| {
                let has_room = failure.check(scratch.reserve(layout.size(b)));
                let sensitivity = if has_room { job(scratch, b, out) } else { None };
                if sensitivity.is_none() {
                    out.fill(f64::NAN);
                }
                sensitivity
            })
            .collect()
    });
    failure.or(sensitivities.into())
}

/// `diag(A_b⁻¹)` of one block: the sums of squares of the columns of `M`.
struct Diagonal<'a> {
    damped: Damped<'a>,
    b: usize,
    scratch: &'a mut Scratch,
    out: &'a mut [f64],
}

impl Kernel<f64> for Diagonal<'_> {
    type Output = Option<f64>;

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) -> Option<f64> {
        let Self { damped, b, scratch, out } = self;
        let largest = damped.factor(simd.isa(), b, scratch)?;
        let size = out.len();
        out.fill(0.0);
        for (i, row) in scratch.lower.chunks(padded(size)).take(size).enumerate() {
            for (d, x) in out[..=i].iter_mut().zip(row) {
                *d += x * x;
            }
        }
        Some(damped.sensitivity(b, largest, out.iter().sum()))
    }
}

#[cfg(test)]
mod tests;
