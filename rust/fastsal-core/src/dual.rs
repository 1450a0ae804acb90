//! The dual form: `diag(A⁻¹)` from the gradients themselves, for blocks wider than there are samples.
//!
//! With `G` `[N, B]` the gradients of a block and `s` the number of samples,
//! `A = GᵀG / s + λI` and, by Woodbury, `diag(A⁻¹) = (1 - diag(Gᵀ (sλI + GGᵀ)⁻¹ G)) / λ`: an `[N, N]` matrix
//! instead of a `[B, B]` one. With `sλI + GGᵀ = UᵀU` the inner diagonal is the column sums of squares of
//! `U⁻ᵀG`. Everything is computed in double precision.

use crate::parallel::prelude::*;

use crate::cholesky::{cholesky, subtract_row};
use crate::error::{check_length, check_positive, Error, Result};
use crate::isa::Isa;
use crate::layout::{row_base, triangle, Layout};
use crate::memory::{self, Aligned};
use crate::parallel::{self, checkpoint_at};
use crate::rows::{with_rows, AnyRows, Element};
use crate::scratch::{Failure, Scratch};
use crate::simd::{dispatch, padded, Kernel, Simd};
use crate::statistics::Report;
use crate::syrk::syrk;

/// Weights whose gradients are copied together.
const WEIGHTS: usize = 64;

/// Parts in which a block's columns are summed; fixed, so that sums do not depend on the threads.
const PARTS: usize = 16;

/// Columns that are solved together, a few vectors of each row.
const STRIP: usize = 64;

/// What memory of the size of the number of rows is for.
const GRAM: &str = "the Gram matrix of the rows";
const COLUMNS: &str = "columns of the rows";

/// Write `diag(A⁻¹)` of every block to `out` (`[d]`); `kept` (true = kept, `None` = all) says which
/// weights are still in the model.
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit; [`Error::Memory`].
pub fn inverse_diagonal(
    layout: Layout,
    rows: AnyRows<'_>,
    samples: f64,
    kept: Option<&[bool]>,
    damping: f64,
    out: &mut [f64],
) -> Result<Report> {
    check_length("rows", rows.d(), layout.len())?;
    check_length("out", out.len(), layout.len())?;
    if let Some(kept) = kept {
        check_length("kept", kept.len(), layout.len())?;
    }
    check_positive("samples", samples)?;
    check_positive("damping", damping)?;
    // What is added to the diagonal of the Gram matrix.
    check_positive("samples times damping", samples * damping)?;
    let n = rows.n();
    if Layout::new(n, n.max(1)).is_err() {
        let expected = "few enough for their Gram matrix to fit into memory";
        return Err(Error::Value { what: "number of rows", got: n.to_string(), expected });
    }
    let (isa, failure) = (Isa::chosen()?, Failure::default());
    let blocks: Vec<Option<f64>> = parallel::run(|| {
        out.par_chunks_mut(layout.block())
            .enumerate()
            .map_init(Scratch::default, |scratch, (b, out)| {
                let block = Block { rows, first: b * layout.block(), kept };
                let room = scratch.panels.reserve(GRAM, n, layout.blocks());
                let result =
                    room.and_then(|()| block.inverse_diagonal(isa, samples, damping, out, scratch));
                result.unwrap_or_else(|error| {
                    failure.check(Err(error));
                    None
                })
            })
            .collect()
    });
    failure.or(blocks.into())
}

/// The gradients of one block.
struct Block<'a> {
    rows: AnyRows<'a>,
    first: usize,
    kept: Option<&'a [bool]>,
}

impl Block<'_> {
    fn is_kept(&self, column: usize) -> bool {
        self.kept.is_none_or(|kept| kept[column])
    }

    fn inverse_diagonal(
        &self,
        isa: Isa,
        samples: f64,
        damping: f64,
        out: &mut [f64],
        scratch: &mut Scratch,
    ) -> Result<Option<f64>> {
        let (n, size) = (self.rows.n(), out.len());
        let gram = self.gram(isa, size)?;
        let mut trace = 0.0;
        scratch.upper.reserve(GRAM, n * padded(n))?;
        let u = scratch.upper.zeros((n * padded(n)).max(1));
        for i in 0..n {
            let row = &mut u[i * padded(n) + i..i * padded(n) + n];
            row.copy_from_slice(&gram[row_base(n, i) + i..row_base(n, i) + n]);
            trace += row[0] / samples;
            row[0] += samples * damping;
        }
        if !cholesky(isa, u, n, &mut scratch.panels) {
            out.fill(f64::NAN);
            return Ok(None);
        }
        let (u, failure): (&[f64], _) = (u, Failure::default());
        out.par_chunks_mut(STRIP).enumerate().for_each_init(Aligned::default, |y, (strip, out)| {
            if !failure.check(y.reserve(COLUMNS, n.saturating_mul(STRIP))) {
                return;
            }
            let first = strip * STRIP;
            self.gather(y, first, out.len(), STRIP);
            dispatch(isa, Forward { u, y, n });
            for (c, out) in out.iter_mut().enumerate() {
                let explained: f64 = (0..n).map(|i| y[i * STRIP + c].powi(2)).sum();
                // At most one in exact arithmetic; rounding must not make the inverse negative.
                let left = (1.0 - explained).max(f64::EPSILON);
                let kept = self.is_kept(self.first + first + c);
                *out = if kept { left / damping } else { 1.0 };
            }
        });
        failure.or(Some(trace / damping))
    }

    /// `GGᵀ`, packed.
    fn gram(&self, isa: Isa, size: usize) -> Result<Vec<f64>> {
        let n = self.rows.n();
        let part = size.div_ceil(PARTS).next_multiple_of(WEIGHTS);
        let partial = (0..size.div_ceil(part))
            .into_par_iter()
            .map(|p| {
                let mut packed = memory::zeros(GRAM, triangle(n))?;
                let (mut panel, mut strip) = (Aligned::default(), Aligned::default());
                panel.reserve(COLUMNS, padded(n).saturating_mul(WEIGHTS))?;
                strip.reserve(COLUMNS, n.saturating_mul(WEIGHTS))?;
                for first in (p * part..size.min((p + 1) * part)).step_by(WEIGHTS) {
                    let width = WEIGHTS.min(size - first);
                    self.gather(&mut strip, first, width, WEIGHTS);
                    // The kernel sums over rows of its panel, here the weights.
                    let panel = panel.zeros(width * padded(n));
                    for r in 0..n {
                        for c in 0..width {
                            panel[c * padded(n) + r] = strip[r * WEIGHTS + c];
                        }
                    }
                    syrk(isa, panel, width, n, padded(n), &mut packed);
                }
                Ok(packed)
            })
            .collect::<Result<Vec<Vec<f64>>>>()?;
        let mut sum = memory::zeros(GRAM, triangle(n))?;
        for packed in partial {
            sum.iter_mut().zip(packed).for_each(|(s, x)| *s += x);
        }
        Ok(sum)
    }

    /// Columns `first..first + width` of the block as `[n, stride]`, zero where pruned.
    fn gather(&self, to: &mut Aligned<f64>, first: usize, width: usize, stride: usize) {
        let to = to.zeros(self.rows.n() * stride);
        let start = self.first + first;
        with_rows!(self.rows, rows => {
            for (r, to) in to.chunks_mut(stride).enumerate() {
                let row = rows.row(r, start, start + width);
                for (c, (to, x)) in to.iter_mut().zip(row).enumerate() {
                    *to = if self.is_kept(start + c) { x.to_f64() } else { 0.0 };
                }
            }
        });
    }
}

/// `Y ← U⁻ᵀ Y` on a strip of columns.
struct Forward<'a> {
    u: &'a [f64],
    y: &'a mut [f64],
    n: usize,
}

impl Kernel<f64> for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) {
        let (n, stride) = (self.n, padded(self.n));
        for i in 0..n {
            checkpoint_at(i, n);
            let (done, rest) = self.y.split_at_mut(i * STRIP);
            let row = &mut rest[..STRIP];
            subtract_row(simd, row, done, STRIP, i, &self.u[i..], stride);
            let scale = 1.0 / self.u[i * stride + i];
            row.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

#[cfg(test)]
mod tests;
