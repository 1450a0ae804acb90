//! The statistics of one parameter, and its damped blocks `A_b = F_b + λ I`.
//!
//! Statistics are sums over samples, in single or double precision; everything here is computed in
//! double precision. Weights that are already pruned take no part: their rows and columns are the
//! identity.

use crate::parallel::prelude::*;

use crate::cholesky::{cholesky, invert_factor};
use crate::error::{check_length, check_positive, Result};
use crate::isa::Isa;
use crate::layout::{row_base, triangle, Layout};
use crate::panels;
use crate::parallel;
use crate::scratch::{unpack, Scratch};
use crate::simd::{dispatch, padded, Kernel, Real, Simd};
use crate::syrk::syrk_of_lower;

/// Weights whose diagonal one item of a loop copies.
const DIAGONAL_TASK: usize = 1 << 12;

/// `sum_n g_nb g_nbᵀ` of all blocks, packed, in either precision.
#[derive(Debug, Clone, Copy)]
pub enum Packed<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Double precision.
    F64(&'a [f64]),
}

/// Evaluate `$body` with `$packed: &[T]` for the precision at hand.
macro_rules! with_packed {
    ($any:expr, $packed:ident => $body:expr) => {
        match $any {
            Packed::F32($packed) => $body,
            Packed::F64($packed) => $body,
        }
    };
}
pub(crate) use with_packed;

/// The statistics of one parameter, borrowed; its parts fit each other.
#[derive(Debug, Clone, Copy)]
pub struct Statistics<'a> {
    layout: Layout,
    packed: Packed<'a>,
    samples: f64,
    kept: Option<&'a [bool]>,
}

impl<'a> Statistics<'a> {
    /// Join packed sums, the number of samples (real, because statistics can be weighted) and the
    /// weights that are still in the model (true = kept, `None` = all).
    ///
    /// # Errors
    /// [`crate::Error::Length`] or [`crate::Error::Value`] when the parts do not fit each other.
    pub fn new(
        layout: Layout,
        packed: Packed<'a>,
        samples: f64,
        kept: Option<&'a [bool]>,
    ) -> Result<Self> {
        check_length("packed", with_packed!(packed, p => p.len()), layout.packed_len())?;
        if let Some(kept) = kept {
            check_length("kept", kept.len(), layout.len())?;
        }
        check_positive("samples", samples)?;
        Ok(Self { layout, packed, samples, kept })
    }

    /// How the parameter is cut into blocks.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Add `damping`, `λ`, to the diagonal of every block.
    ///
    /// # Errors
    /// [`crate::Error::Value`] when `damping` is not a finite number above zero.
    pub fn damped(self, damping: f64) -> Result<Damped<'a>> {
        check_positive("damping", damping)?;
        Ok(Damped { statistics: self, damping })
    }

    /// Write `F_b` of every block to `out` (`[blocks, B, B]`, a short last block padded with zeros).
    ///
    /// # Errors
    /// [`crate::Error::Length`] when `out` does not fit.
    pub fn blocks(&self, out: &mut [f64]) -> Result<()> {
        let Self { layout, samples, .. } = *self;
        check_length("out", out.len(), layout.dense_len())?;
        let stride = layout.block();
        parallel::run(|| {
            out.par_chunks_mut(stride * stride).enumerate().for_each(|(b, out)| {
                let range = layout.packed_range(b);
                out.fill(0.0);
                let size = layout.size(b);
                with_packed!(self.packed, p => unpack(&p[range], size, out, stride));
                out.iter_mut().for_each(|x| *x /= samples);
            });
        });
        Ok(())
    }

    /// Write `diag(F)`, the mean squared gradient of each weight, to `out` (`[d]`).
    ///
    /// # Errors
    /// [`crate::Error::Length`] when `out` does not fit.
    pub fn diagonal(&self, out: &mut [f64]) -> Result<()> {
        let Self { layout, samples, .. } = *self;
        check_length("out", out.len(), layout.len())?;
        parallel::run(|| {
            // Blocks of a few weights are too little for an item of a loop.
            let block = layout.block();
            let group = DIAGONAL_TASK.div_ceil(block);
            out.par_chunks_mut(group * block).enumerate().for_each(|(task, out)| {
                let first = layout.packed_range(task * group).start;
                with_packed!(self.packed, p => {
                    let blocks = p[first..].chunks(triangle(block)).zip(out.chunks_mut(block));
                    blocks.for_each(|(packed, out)| diagonal_means(packed, samples, out));
                });
            });
        });
        Ok(())
    }

    /// Which weights of block `b` are kept.
    pub(crate) fn kept_in(&self, b: usize) -> Option<&'a [bool]> {
        self.kept.map(|kept| &kept[self.layout.range(b)])
    }
}

/// Divide the diagonal of a packed triangle by the number of samples.
fn diagonal_means<T: Real>(packed: &[T], samples: f64, out: &mut [f64]) {
    let (mut at, size) = (0, out.len());
    for (i, out) in out.iter_mut().enumerate() {
        *out = packed[at].into() / samples;
        at += size - i;
    }
}

/// Statistics with a damping: the matrices `A_b`.
#[derive(Debug, Clone, Copy)]
pub struct Damped<'a> {
    statistics: Statistics<'a>,
    damping: f64,
}

impl<'a> Damped<'a> {
    /// How the parameter is cut into blocks.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.statistics.layout
    }

    /// Which weights of block `b` are kept.
    pub(crate) fn kept_in(&self, b: usize) -> Option<&'a [bool]> {
        self.statistics.kept_in(b)
    }

    /// The sums over samples.
    pub(crate) fn packed(&self) -> Packed<'a> {
        self.statistics.packed
    }

    /// Number of samples.
    pub(crate) fn samples(&self) -> f64 {
        self.statistics.samples
    }

    /// `λ`.
    pub(crate) fn damping(&self) -> f64 {
        self.damping
    }

    /// Compute [`Report::sensitivity`] of block `b` from `max_i F_ii` and `tr A_b⁻¹ >= ‖A_b⁻¹‖`.
    pub(crate) fn sensitivity(&self, b: usize, largest: f64, inverse_trace: f64) -> f64 {
        // Pruned weights add ones to the trace that are not part of the kept matrix.
        let pruned = self.kept_in(b).map_or(0, |k| k.iter().filter(|k| !**k).count());
        largest * (inverse_trace - pruned as f64).clamp(0.0, 1.0 / self.damping)
    }

    /// Write the upper triangle of `A_b` by rows to `a`; return `max_i F_ii`.
    ///
    /// Inlined into the kernels that begin with it, for their instruction sets.
    #[inline(always)]
    pub(crate) fn write(&self, b: usize, a: &mut [f64]) -> f64 {
        with_packed!(self.statistics.packed, packed => self.write_from(packed, b, a))
    }

    #[inline(always)]
    fn write_from<T: Real>(&self, packed: &[T], b: usize, a: &mut [f64]) -> f64 {
        let Self { statistics: Statistics { layout, samples, .. }, damping } = *self;
        let kept = self.kept_in(b);
        let (size, block) = (layout.size(b), &packed[layout.packed_range(b)]);
        let (stride, scale) = (padded(size), 1.0 / samples);
        let mut largest = 0.0f64;
        for i in 0..size {
            let from = &block[row_base(size, i) + i..row_base(size, i) + size];
            let row = &mut a[i * stride + i..i * stride + size];
            for (x, f) in row.iter_mut().zip(from) {
                *x = (*f).into() * scale;
            }
            if let Some(kept) = kept {
                for (x, kept_j) in row.iter_mut().zip(&kept[i..]) {
                    if !(*kept_j && kept[i]) {
                        *x = 0.0;
                    }
                }
                if !kept[i] {
                    row[0] = 1.0;
                    continue;
                }
            }
            largest = largest.max(row[0]);
            row[0] += damping;
        }
        largest
    }

    /// Factor `A_b = UᵀU` and write `M = U⁻ᵀ` to `scratch.lower`; return `max_i F_ii`, or `None` when
    /// `A_b` is not positive definite. Inlined like [`Damped::write`].
    #[inline(always)]
    pub(crate) fn factor(&self, isa: Isa, b: usize, scratch: &mut Scratch) -> Option<f64> {
        let size = self.layout().size(b);
        let a = scratch.upper.room(size * padded(size));
        let m = scratch.lower.room(size * padded(size));
        let largest = self.write(b, a);
        if !cholesky(isa, a, size, &mut scratch.panels) {
            return None;
        }
        invert_factor(isa, a, m, size, padded(size), &mut scratch.panels);
        Some(largest)
    }

    /// Write `A_b⁻¹ = MᵀM`, packed, to `scratch.packed`; return its sensitivity, or `None` when `A_b`
    /// is not positive definite.
    pub(crate) fn invert(&self, isa: Isa, b: usize, scratch: &mut Scratch) -> Option<f64> {
        dispatch(isa, Invert { damped: self, b, scratch })
    }
}

/// The kernel of [`Damped::invert`].
struct Invert<'a> {
    damped: &'a Damped<'a>,
    b: usize,
    scratch: &'a mut Scratch,
}

impl Kernel<f64> for Invert<'_> {
    type Output = Option<f64>;

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self, simd: S) -> Option<f64> {
        let Self { damped, b, scratch } = self;
        let largest = damped.factor(simd.isa(), b, scratch)?;
        let size = damped.layout().size(b);
        let Scratch { upper, lower, packed, panels, .. } = scratch;
        let packed = packed.room(triangle(size));
        if size >= panels::SMALLEST {
            panels::square_of_lower(simd.isa(), lower, size, upper, packed, panels);
        } else {
            syrk_of_lower(simd.isa(), lower, size, packed);
        }
        let trace = (0..size).map(|i| packed[row_base(size, i) + i]).sum();
        Some(damped.sensitivity(b, largest, trace))
    }
}

/// Outcome of factoring the blocks of one parameter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Blocks that are not positive definite in double precision; their results are NaN.
    pub failed: Vec<usize>,
    /// For each block, an upper bound of `max_i F_ii * ‖A_b⁻¹‖₂`: the factor by which the relative
    /// error of the sums is multiplied in `diag(A_b⁻¹)`. To first order `δ(A⁻¹)_jj = -hᵀEh` with
    /// `h = A⁻¹e_j`; for independent roundings `|E_ik| <= ε √(F_ii F_kk)` it has the scale
    /// `ε sum_i h_i² F_ii`, at most `ε max_i F_ii ‖h‖²`, and `‖h‖² <= ‖A⁻¹‖ (A⁻¹)_jj`.
    pub sensitivity: Vec<f64>,
}

impl From<Vec<Option<f64>>> for Report {
    /// Collect the sensitivities of all blocks; `None` marks a block that has failed.
    fn from(blocks: Vec<Option<f64>>) -> Self {
        Self {
            failed: positions(&blocks, Option::is_none),
            sensitivity: blocks.iter().map(|s| s.unwrap_or(f64::INFINITY)).collect(),
        }
    }
}

/// Positions of the items that `is_wanted`.
pub(crate) fn positions<T>(items: &[T], is_wanted: impl Fn(&T) -> bool) -> Vec<usize> {
    items.iter().enumerate().filter(|(_, item)| is_wanted(item)).map(|(i, _)| i).collect()
}
