//! The largest N of every M scores.

use crate::error::{check_length, Error, Result};
use crate::groups::volume;
use crate::isa::Isa;
use crate::keys::{check_nan, key, SCORES_PER_TASK};
use crate::parallel;
use crate::parallel::prelude::*;
use crate::simd::{dispatch, Kernel, Simd};

/// Return `ceil(size n / m)`, for `n <= m`, of sizes whose product may have no number.
pub(crate) fn share(size: usize, n: usize, m: usize) -> usize {
    (size as u128 * n as u128).div_ceil(m as u128) as usize
}

/// Keep the `n` largest of every `m` scores along the middle axis of `[outer, width, inner]`.
///
/// A short last group of `r` scores keeps `ceil(r n / m)`. Among equal scores the first are pruned.
///
/// # Errors
/// [`Error::Length`] and [`Error::Value`] for arguments that do not fit.
pub fn n_of_m(
    scores: &[f32],
    shape: (usize, usize, usize),
    n: usize,
    m: usize,
    kept: &mut [bool],
) -> Result<()> {
    let (_, width, inner) = shape;
    check_length("scores", scores.len(), volume(shape)?)?;
    check_length("kept", kept.len(), scores.len())?;
    check_nan(&[scores])?;
    if n > m || m == 0 {
        let got = format!("{n}:{m}");
        return Err(Error::Value { what: "pattern", got, expected: "N:M with N <= M and M >= 1" });
    }
    let (isa, row) = (Isa::chosen()?, (width * inner).max(1));
    let keep = share(m.min(width), n, m);
    // Rows are joined to tasks; a group does not go beyond its row.
    let rows = SCORES_PER_TASK.div_ceil(row).min(scores.len().div_ceil(row)).max(1);
    let whole = width.is_multiple_of(m);
    parallel::run(|| {
        kept.par_chunks_mut(rows * row).zip(scores.par_chunks(rows * row)).for_each(
            |(kept, scores)| match m {
                2 if inner == 1 && whole => dispatch(isa, Short::<2> { scores, keep, kept }),
                4 if inner == 1 && whole => dispatch(isa, Short::<4> { scores, keep, kept }),
                8 if inner == 1 && whole => dispatch(isa, Short::<8> { scores, keep, kept }),
                _ => {
                    let mut order = Vec::new();
                    for (kept, scores) in kept.chunks_mut(row).zip(scores.chunks(row)) {
                        keep_in_row(scores, (width, inner), (n, m), &mut order, kept);
                    }
                }
            },
        );
    });
    Ok(())
}

/// Keeps the largest `keep` of every `M` neighbors.
struct Short<'a, const M: usize> {
    scores: &'a [f32],
    keep: usize,
    kept: &'a mut [bool],
}

impl<const M: usize> Kernel<f32> for Short<'_, M> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = f32>>(self, _simd: S) {
        let Self { scores, keep, kept } = self;
        let (groups, _) = scores.as_chunks::<M>();
        let (kept, _) = kept.as_chunks_mut::<M>();
        for (kept, group) in kept.iter_mut().zip(groups) {
            for i in 0..M {
                // Of equal scores the later ones rank first, and are kept.
                let before = (0..M).map(|j| match j > i {
                    true => u8::from(group[j] >= group[i]),
                    false => u8::from(group[j] > group[i]),
                });
                kept[i] = usize::from(before.sum::<u8>()) < keep;
            }
        }
    }
}

/// Keep the `n` largest of every `m` scores of a row `[width, inner]`.
pub(super) fn keep_in_row(
    scores: &[f32],
    (width, inner): (usize, usize),
    (n, m): (usize, usize),
    order: &mut Vec<usize>,
    kept: &mut [bool],
) {
    kept.fill(false);
    for i in 0..inner {
        for first in (0..width).step_by(m) {
            let size = m.min(width - first);
            order.clear();
            order.extend((first..first + size).map(|w| w * inner + i));
            // Stable: among equal scores the later positions come first, and are kept.
            order.reverse();
            order.sort_by_key(|at| std::cmp::Reverse(key(scores[*at])));
            for at in &order[..share(size, n, m)] {
                kept[*at] = true;
            }
        }
    }
}
