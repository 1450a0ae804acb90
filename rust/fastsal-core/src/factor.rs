//! The damped blocks `A_b = F_b + λ I`: factorisation, inverse, and the inverse's diagonal.
//!
//! Statistics are sums over samples, in single or double precision; everything here is computed in
//! double. Weights that are pruned take no further part: their rows and columns are the identity.

use rayon::prelude::*;

use crate::dense::{cholesky, inverse_packed, invert, room, unpack, Scratch};
use crate::error::{check_length, Error, Result};
use crate::layout::{row_base, triangle, Layout};
use crate::parallel;
use crate::simd::{dispatch, Isa, Kernel, Real, Simd};
use crate::tiles::padded;

/// The statistics of one parameter, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Statistics<'a, T> {
    /// How it is cut into blocks.
    pub layout: Layout,
    /// `sum_n g_nb g_nbᵀ`, packed.
    pub packed: &'a [T],
    /// Number of samples, `N`; real, since statistics can be weighted.
    pub samples: f64,
    /// True = still in the model; `None` for all.
    pub kept: Option<&'a [bool]>,
}

/// What a factorisation says of one parameter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Blocks that are not positive definite in double precision; their results are NaN.
    pub failed: Vec<usize>,
    /// For each block, `max_i F_ii * ‖A_b⁻¹‖₂` (an upper bound of it): what the relative error of the
    /// sums is multiplied by in `diag(A_b⁻¹)`. To first order `δ(A⁻¹)_jj = -hᵀEh` with `h = A⁻¹e_j`;
    /// for independent roundings `|E_ik| <= ε √(F_ii F_kk)` it has the scale `ε sum_i h_i² F_ii`, at most
    /// `ε max_i F_ii ‖h‖²`, and `‖h‖² <= ‖A⁻¹‖ (A⁻¹)_jj`.
    pub sensitivity: Vec<f64>,
}

impl<'a, T: Real> Statistics<'a, T> {
    /// # Errors
    /// [`Error::Length`] or [`Error::Value`] when the parts do not fit each other.
    pub fn check(&self) -> Result<()> {
        check_length("packed", self.packed.len(), self.layout.packed_len())?;
        if let Some(kept) = self.kept {
            check_length("kept", kept.len(), self.layout.len)?;
        }
        if !(self.samples > 0.0 && self.samples.is_finite()) {
            let got = self.samples.to_string();
            return Err(Error::Value { what: "samples", got, expected: "a number above zero" });
        }
        Ok(())
    }

    /// The packed sums of block `b`.
    pub(crate) fn block(&self, b: usize) -> &'a [T] {
        let start = self.layout.packed_start(b);
        &self.packed[start..start + triangle(self.layout.size(b))]
    }

    /// Which weights of block `b` are kept.
    pub(crate) fn kept_in(&self, b: usize) -> Option<&'a [bool]> {
        let start = b * self.layout.block;
        self.kept.map(|k| &k[start..start + self.layout.size(b)])
    }

    /// What [`Report::sensitivity`] says of block `b`, from `max_i F_ii` and `tr A_b⁻¹ >= ‖A_b⁻¹‖`.
    pub(crate) fn sensitivity(
        &self,
        b: usize,
        damping: f64,
        largest: f64,
        inverse_trace: f64,
    ) -> f64 {
        // Pruned weights add ones to the trace that are not part of the kept matrix.
        let pruned = self.kept_in(b).map_or(0, |k| k.iter().filter(|k| !**k).count());
        largest * (inverse_trace - pruned as f64).clamp(0.0, 1.0 / damping)
    }

    /// Write the upper triangle of `A_b` by rows into `a`; returns `max_i F_ii`.
    pub(crate) fn damped(&self, b: usize, damping: f64, a: &mut [f64]) -> f64 {
        let (size, block, kept) = (self.layout.size(b), self.block(b), self.kept_in(b));
        let (stride, scale) = (padded(size), 1.0 / self.samples);
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
}

impl<T: Real> Statistics<'_, T> {
    /// `M = U⁻ᵀ` of `A_b = UᵀU` into `scratch.lower`; `max_i F_ii`, or `None` when `A_b` cannot be
    /// factored.
    #[inline(always)]
    pub(crate) fn factor_of(
        &self,
        isa: Isa,
        b: usize,
        damping: f64,
        scratch: &mut Scratch,
    ) -> Option<f64> {
        let size = self.layout.size(b);
        let a = room(&mut scratch.upper, size * padded(size));
        let m = room(&mut scratch.lower, size * padded(size));
        let largest = self.damped(b, damping, a);
        if !cholesky(isa, a, size) {
            return None;
        }
        invert(isa, a, m, size);
        Some(largest)
    }

    /// `A_b⁻¹`, packed, into `scratch.packed`; its sensitivity, or `None` when `A_b` cannot be
    /// factored.
    #[inline(always)]
    pub(crate) fn inverse_of(
        &self,
        isa: Isa,
        b: usize,
        damping: f64,
        scratch: &mut Scratch,
    ) -> Option<f64> {
        let largest = self.factor_of(isa, b, damping, scratch)?;
        let size = self.layout.size(b);
        let packed = room(&mut scratch.packed, triangle(size));
        inverse_packed(isa, &scratch.lower, size, packed);
        let trace = (0..size).map(|i| packed[row_base(size, i) + i]).sum();
        Some(self.sensitivity(b, damping, largest, trace))
    }
}

/// `diag(A⁻¹)` of every block into `out` (`[d]`), without forming the inverse.
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit.
pub fn inverse_diagonal<T: Real>(
    statistics: Statistics<'_, T>,
    damping: f64,
    out: &mut [f64],
) -> Result<Report> {
    check_length("out", out.len(), statistics.layout.len)?;
    for_each_block(statistics, damping, out, statistics.layout.block, Want::Diagonal)
}

/// `A⁻¹` of every block into `out` (`[blocks, B, B]`, a short last block padded with zeros).
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit.
pub fn inverse<T: Real>(
    statistics: Statistics<'_, T>,
    damping: f64,
    out: &mut [f64],
) -> Result<Report> {
    let layout = statistics.layout;
    check_length("out", out.len(), layout.blocks() * layout.block * layout.block)?;
    for_each_block(statistics, damping, out, layout.block * layout.block, Want::Inverse)
}

/// `F_b` of every block into `out` (`[blocks, B, B]`, a short last block padded with zeros).
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit.
pub fn blocks<T: Real>(statistics: Statistics<'_, T>, out: &mut [f64]) -> Result<()> {
    statistics.check()?;
    let layout = statistics.layout;
    check_length("out", out.len(), layout.blocks() * layout.block * layout.block)?;
    parallel::run(|| {
        out.par_chunks_mut(layout.block * layout.block).enumerate().for_each(|(b, out)| {
            let size = layout.size(b);
            let scaled: Vec<f64> =
                statistics.block(b).iter().map(|x| (*x).into() / statistics.samples).collect();
            out.fill(0.0);
            unpack(&scaled, size, out, layout.block);
        });
    });
    Ok(())
}

/// `diag(F)` into `out` (`[d]`): the mean squared gradient of each weight.
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit.
pub fn diagonal<T: Real>(statistics: Statistics<'_, T>, out: &mut [f64]) -> Result<()> {
    statistics.check()?;
    let layout = statistics.layout;
    check_length("out", out.len(), layout.len)?;
    parallel::run(|| {
        out.par_chunks_mut(layout.block).enumerate().for_each(|(b, out)| {
            let (size, block) = (layout.size(b), statistics.block(b));
            for (i, out) in out.iter_mut().enumerate() {
                *out = block[row_base(size, i) + i].into() / statistics.samples;
            }
        });
    });
    Ok(())
}

/// `λ` must be a positive finite number.
pub(crate) fn check_damping(damping: f64) -> Result<()> {
    if damping > 0.0 && damping.is_finite() {
        return Ok(());
    }
    let got = damping.to_string();
    Err(Error::Value { what: "damping", got, expected: "a finite number above zero" })
}

#[derive(Clone, Copy)]
enum Want {
    Diagonal,
    Inverse,
}

fn for_each_block<T: Real>(
    statistics: Statistics<'_, T>,
    damping: f64,
    out: &mut [f64],
    out_per_block: usize,
    want: Want,
) -> Result<Report> {
    statistics.check()?;
    check_damping(damping)?;
    let isa = Isa::best();
    let blocks: Vec<Option<f64>> = parallel::run(|| {
        out.par_chunks_mut(out_per_block)
            .enumerate()
            .map_init(Scratch::default, |scratch, (b, out)| {
                dispatch(isa, Block { statistics, b, damping, want, out, scratch })
            })
            .collect()
    });
    Ok(blocks.into())
}

impl From<Vec<Option<f64>>> for Report {
    /// Blocks without a sensitivity have failed.
    fn from(blocks: Vec<Option<f64>>) -> Self {
        let failed = blocks.iter().enumerate().filter(|(_, s)| s.is_none());
        Self {
            failed: failed.map(|(b, _)| b).collect(),
            sensitivity: blocks.iter().map(|s| s.unwrap_or(f64::INFINITY)).collect(),
        }
    }
}

/// One block; its sensitivity, or `None` when it cannot be factored.
struct Block<'a, T> {
    statistics: Statistics<'a, T>,
    b: usize,
    damping: f64,
    want: Want,
    out: &'a mut [f64],
    scratch: &'a mut Scratch,
}

impl<T: Real> Kernel<f64> for Block<'_, T> {
    type Output = Option<f64>;

    #[inline(always)]
    fn run<S: Simd<T = f64>>(self) -> Option<f64> {
        let Self { statistics, b, damping, want, out, scratch } = self;
        let size = statistics.layout.size(b);
        let sensitivity = match want {
            Want::Diagonal => statistics.factor_of(S::ISA, b, damping, scratch).map(|largest| {
                out.fill(0.0);
                for (i, row) in scratch.lower.chunks(padded(size)).take(size).enumerate() {
                    for (d, x) in out[..=i].iter_mut().zip(row) {
                        *d += x * x;
                    }
                }
                statistics.sensitivity(b, damping, largest, out.iter().sum())
            }),
            Want::Inverse => statistics.inverse_of(S::ISA, b, damping, scratch).inspect(|_| {
                out.fill(0.0);
                unpack(&scratch.packed[..triangle(size)], size, out, statistics.layout.block);
            }),
        };
        if sensitivity.is_none() {
            out.fill(f64::NAN);
        }
        sensitivity
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gram::accumulate;
    use crate::rows::Rows;
    use crate::tests::{random, relative_error};

    /// Sums of `n` random gradients.
    pub(crate) fn sums(layout: Layout, n: usize) -> Vec<f64> {
        let data = random(7, n * layout.len);
        let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; layout.len]);
        let rows = Rows::new(&data, n, layout.len, layout.len).expect("rows");
        accumulate(layout, rows, &mut packed, &mut sums, false).expect("accumulate");
        packed
    }

    /// Inverse by Gauss-Jordan elimination with row exchanges.
    fn slow_inverse(mut a: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
        let n = a.len();
        for (i, row) in a.iter_mut().enumerate() {
            row.extend((0..n).map(|j| f64::from(u8::from(i == j))));
        }
        for c in 0..n {
            let pivot =
                (c..n).max_by(|x, y| a[*x][c].abs().total_cmp(&a[*y][c].abs())).expect("row");
            a.swap(c, pivot);
            let scale = 1.0 / a[c][c];
            a[c].iter_mut().for_each(|x| *x *= scale);
            let row = a[c].clone();
            for (r, other) in a.iter_mut().enumerate() {
                let factor = other[c];
                if r != c {
                    other.iter_mut().zip(&row).for_each(|(x, p)| *x -= factor * p);
                }
            }
        }
        a.into_iter().map(|row| row[n..].to_vec()).collect()
    }

    #[test]
    fn equals_gauss_jordan() {
        for (len, block, n) in [(1, 1, 3), (70, 64, 100), (200, 64, 20), (130, 130, 90), (37, 9, 5)]
        {
            let layout = Layout::new(len, block);
            let packed = sums(layout, n);
            let kept: Vec<bool> = (0..len).map(|i| i % 3 != 1).collect();
            for (kept, damping) in [(None, 1e-3), (Some(kept.as_slice()), 0.1)] {
                let statistics = Statistics { layout, packed: &packed, samples: n as f64, kept };
                let mut dense = vec![0.0; layout.blocks() * block * block];
                blocks(statistics, &mut dense).expect("blocks");
                let (mut diagonal, mut full) = (vec![0.0; len], dense.clone());
                let report =
                    inverse_diagonal(statistics, damping, &mut diagonal).expect("diagonal");
                assert!(report.failed.is_empty());
                inverse(statistics, damping, &mut full).expect("inverse");
                for b in 0..layout.blocks() {
                    let size = layout.size(b);
                    let is_kept = |i: usize| kept.is_none_or(|k| k[b * block + i]);
                    let a: Vec<Vec<f64>> = (0..size)
                        .map(|i| {
                            (0..size)
                                .map(|j| match (i == j, is_kept(i) && is_kept(j)) {
                                    (true, false) => 1.0,
                                    (false, false) => 0.0,
                                    (same, true) => {
                                        dense[(b * block + i) * block + j]
                                            + if same { damping } else { 0.0 }
                                    }
                                })
                                .collect()
                        })
                        .collect();
                    let expected = slow_inverse(a);
                    for i in 0..size {
                        let got: Vec<f64> =
                            (0..size).map(|j| full[(b * block + i) * block + j]).collect();
                        assert!(relative_error(&got, &expected[i]) < 1e-10);
                        assert!((diagonal[b * block + i] / expected[i][i] - 1.0).abs() < 1e-10);
                    }
                }
            }
        }
    }

    #[test]
    fn bad_blocks_are_named_and_nan() {
        let layout = Layout::new(200, 64);
        let mut packed = sums(layout, 10);
        let start = layout.packed_start(2);
        packed[start] = -1e9;
        let statistics = Statistics { layout, packed: &packed, samples: 10.0, kept: None };
        let mut out = vec![0.0; 200];
        let report = inverse_diagonal(statistics, 1e-3, &mut out).expect("report");
        assert_eq!(report.failed, [2]);
        assert!(out[128..192].iter().all(|x| x.is_nan()) && out[..128].iter().all(|x| *x > 0.0));
        for damping in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(inverse_diagonal(statistics, damping, &mut out).is_err());
        }
    }
}
