//! Inverses of the damped blocks `A_b = F_b + λ I`, and the diagonals of the inverses.

use crate::parallel::prelude::*;

use crate::error::{check_length, Result};
use crate::interleaved::{self, Diagonals};
use crate::isa::Isa;
use crate::layout::{triangle, Layout};
use crate::memory::Aligned;
use crate::parallel;
use crate::scratch::{unpack, Failure, Scratch};
use crate::simd::{dispatch, padded, Kernel, Simd};
use crate::statistics::{Damped, Report};

/// Write `diag(A⁻¹)` of every block to `out` (`[d]`), without forming the inverse.
///
/// # Errors
/// [`crate::Error::Length`] when `out` does not fit; [`crate::Error::Memory`].
pub fn inverse_diagonal(damped: Damped<'_>, out: &mut [f64]) -> Result<Report> {
    inverse_diagonal_with(Isa::chosen()?, damped, out)
}

fn inverse_diagonal_with(isa: Isa, damped: Damped<'_>, out: &mut [f64]) -> Result<Report> {
    let layout = damped.layout();
    check_length("out", out.len(), layout.len())?;
    if layout.block() <= interleaved::LARGEST {
        return Ok(small_blocks(isa, damped, out));
    }
    for_each_block(layout, out, layout.block(), |scratch, b, out| {
        let size = out.len();
        if size > interleaved::LARGEST {
            return dispatch(isa, Diagonal { damped, b, scratch, out });
        }
        // How a block is processed depends on its own size alone.
        let (memory, diagonals) = (&mut scratch.upper, out);
        dispatch(isa, Diagonals { damped, b, size, memory, diagonals })[0]
    })
}

/// [`inverse_diagonal`] of small blocks.
fn small_blocks(isa: Isa, damped: Damped<'_>, out: &mut [f64]) -> Report {
    let block = damped.layout().block();
    let found: Vec<Vec<Option<f64>>> = parallel::run(|| {
        out.par_chunks_mut(interleaved::BLOCKS * block)
            .enumerate()
            .map_init(Aligned::default, |memory, (i, out)| {
                let mut found = Vec::with_capacity(interleaved::BLOCKS);
                // A short last block is processed by itself: no block depends on those beside it.
                let (whole, short) = out.split_at_mut(out.len() / block * block);
                let (last, size) = (whole.len() / block, short.len());
                for (k, size, out) in [(0, block, whole), (last, size, short)] {
                    if out.is_empty() {
                        continue;
                    }
                    let b = i * interleaved::BLOCKS + k;
                    let (memory, diagonals) = (&mut *memory, &mut *out);
                    let each = dispatch(isa, Diagonals { damped, b, size, memory, diagonals });
                    for (out, sensitivity) in out.chunks_mut(size).zip(each) {
                        if sensitivity.is_none() {
                            out.fill(f64::NAN);
                        }
                        found.push(sensitivity);
                    }
                }
                found
            })
            .collect()
    });
    found.into_iter().flatten().collect::<Vec<_>>().into()
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
        if size < layout.block() {
            out.fill(0.0);
        }
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
                let has_room = failure.check(scratch.reserve(layout.size(b), layout.blocks()));
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
