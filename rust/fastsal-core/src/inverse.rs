//! Inverses of the damped blocks `A_b = F_b + λ I`, and the diagonals of the inverses.

use rayon::prelude::*;

use crate::error::{check_length, Result};
use crate::isa::Isa;
use crate::layout::triangle;
use crate::parallel;
use crate::scratch::{unpack, Scratch};
use crate::simd::{dispatch, padded, Kernel, Simd};
use crate::statistics::{Damped, Report};

/// Write `diag(A⁻¹)` of every block to `out` (`[d]`), without forming the inverse.
///
/// # Errors
/// [`crate::Error::Length`] when `out` does not fit.
pub fn inverse_diagonal(damped: Damped<'_>, out: &mut [f64]) -> Result<Report> {
    let (isa, layout) = (Isa::best(), damped.layout());
    check_length("out", out.len(), layout.len())?;
    Ok(for_each_block(out, layout.block(), |scratch, b, out| {
        let largest = damped.factor(isa, b, scratch)?;
        dispatch(isa, ColumnSquares { lower: &scratch.lower, out });
        Some(damped.sensitivity(b, largest, out.iter().sum()))
    }))
}

/// Write `A⁻¹` of every block to `out` (`[blocks, B, B]`, a short last block padded with zeros).
///
/// # Errors
/// [`crate::Error::Length`] when `out` does not fit.
pub fn inverse(damped: Damped<'_>, out: &mut [f64]) -> Result<Report> {
    let (isa, layout) = (Isa::best(), damped.layout());
    check_length("out", out.len(), layout.dense_len())?;
    Ok(for_each_block(out, layout.block() * layout.block(), |scratch, b, out| {
        let sensitivity = damped.invert(isa, b, scratch)?;
        let size = layout.size(b);
        out.fill(0.0);
        unpack(&scratch.packed[..triangle(size)], size, out, layout.block());
        Some(sensitivity)
    }))
}

/// Run `job` for every block and its part of `out`; NaN where `job` returns `None`.
fn for_each_block(
    out: &mut [f64],
    out_per_block: usize,
    job: impl Fn(&mut Scratch, usize, &mut [f64]) -> Option<f64> + Sync + Send,
) -> Report {
    let sensitivities: Vec<Option<f64>> = parallel::run(|| {
        out.par_chunks_mut(out_per_block)
            .enumerate()
            .map_init(Scratch::default, |scratch, (b, out)| {
                let sensitivity = job(scratch, b, out);
                if sensitivity.is_none() {
                    out.fill(f64::NAN);
                }
                sensitivity
            })
            .collect()
    });
    sensitivities.into()
}

/// Sums of squares of the columns of a square lower triangular matrix.
struct ColumnSquares<'a> {
    lower: &'a [f64],
    out: &'a mut [f64],
}

impl Kernel<f64> for ColumnSquares<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self) {
        let Self { lower, out } = self;
        let size = out.len();
        out.fill(0.0);
        for (i, row) in lower.chunks(padded(size)).take(size).enumerate() {
            for (d, x) in out[..=i].iter_mut().zip(row) {
                *d += x * x;
            }
        }
    }
}

#[cfg(test)]
mod tests;
