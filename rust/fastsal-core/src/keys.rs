//! Scores as integer keys: their order, their counts, and the checks that come before.
//!
//! A key orders floats as integers, so that halves of it index histograms.

use crate::parallel::prelude::*;

use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::parallel;
use crate::simd::{dispatch, Kernel, Simd};

/// Scores of one task.
pub(crate) const SCORES_PER_TASK: usize = 1 << 18;

/// Bins of a histogram: the values of half a key.
const BINS: usize = 1 << 16;

/// Map a score to an integer of the same order; both zeros are one, NaN is above infinity.
#[inline(always)]
pub(crate) fn key(score: f32) -> u32 {
    // Adding zero turns -0 into +0.
    let bits = (score + 0.0).to_bits();
    // All bits of a negative number flip, the sign of a positive one.
    bits ^ (((bits as i32) >> 31) as u32 | 0x8000_0000)
}

/// Return the score of a key.
#[must_use]
pub fn score(key: u32) -> f32 {
    f32::from_bits(if key & 0x8000_0000 == 0 { !key } else { key ^ 0x8000_0000 })
}

/// Return the bin of a key in a histogram of upper halves.
#[inline(always)]
pub(crate) fn upper_bin(key: u32) -> Option<usize> {
    Some((key >> 16) as usize)
}

/// Return the bin of a key in a histogram of the lower halves of keys with the upper half `upper`.
#[inline(always)]
pub(crate) fn lower_bin(key: u32, upper: u32) -> Option<usize> {
    (key >> 16 == upper).then_some((key & 0xffff) as usize)
}

/// A contiguous part of one array.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub scores: &'a [f32],
    /// Keys from this one on are not counted.
    pub below: u64,
}

impl<'a> Part<'a> {
    /// Cut an array into parts of one task each.
    pub(crate) fn all(scores: &'a [f32], below: u64) -> impl Iterator<Item = Self> {
        scores.chunks(SCORES_PER_TASK).map(move |scores| Self { scores, below })
    }
}

/// Count the scores with each upper half of the key or, among those with the upper half `upper`, with
/// each lower half. Keys from `below` on are not counted.
///
/// Such counts add up over arrays on several machines: two of them determine a threshold without
/// collecting the scores in one place.
///
/// # Errors
/// [`Error::NanScore`].
pub fn count_keys(scores: &[f32], upper: Option<u32>, below: u64) -> Result<Vec<u64>> {
    check_nan(&[scores])?;
    let parts: Vec<Part<'_>> = Part::all(scores, below).collect();
    Ok(parallel::run(|| match upper {
        None => histogram(&parts, upper_bin),
        Some(upper) => histogram(&parts, |key| lower_bin(key, upper)),
    }))
}

/// Count the keys of each bin.
pub(crate) fn histogram(parts: &[Part<'_>], bin: impl Fn(u32) -> Option<usize> + Sync) -> Vec<u64> {
    let share = parts.len().div_ceil(4 * parallel::parts()).max(1);
    let counted = parts.par_chunks(share).map(|parts| {
        let mut counts = vec![0u64; BINS];
        for part in parts {
            for s in part.scores {
                let k = key(*s);
                if let (true, Some(bin)) = (u64::from(k) < part.below, bin(k)) {
                    counts[bin] += 1;
                }
            }
        }
        counts
    });
    let add = |mut a: Vec<u64>, b: Vec<u64>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    counted.reduce_with(add).unwrap_or_else(|| vec![0; BINS])
}

/// Find the bin that holds the `k`-th key, and how many of the `k` are in it.
pub(crate) fn find_bin(counts: &[u64], k: u64) -> (usize, u64) {
    let mut left = k;
    for (bin, count) in counts.iter().enumerate() {
        if left <= *count {
            return (bin, left);
        }
        left -= count;
    }
    (counts.len() - 1, 0)
}

/// Count the scores with the key `cut`.
pub(crate) fn count_equal(scores: &[f32], cut: u32) -> usize {
    scores.par_chunks(SCORES_PER_TASK).map(|part| equal_in(part, cut)).sum()
}

/// [`count_equal`] of one task.
pub(crate) fn equal_in(part: &[f32], cut: u32) -> usize {
    // Counters of 32 bits fill vectors; a part has fewer scores than they count.
    part.iter().map(|s| u32::from(key(*s) == cut)).sum::<u32>() as usize
}

/// Whether any score is NaN.
struct AnyNan<'a> {
    part: &'a [f32],
}

impl Kernel<f32> for AnyNan<'_> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd<T = f32>>(self, _simd: S) -> bool {
        // A fold without an early exit vectorizes.
        self.part.iter().fold(false, |nan, s| nan | s.is_nan())
    }
}

/// Report the first NaN.
pub(crate) fn check_nan(arrays: &[&[f32]]) -> Result<()> {
    let isa = Isa::chosen()?;
    let nan = parallel::run(|| {
        arrays.par_iter().enumerate().find_map_first(|(array, scores)| {
            let parts = scores.par_chunks(SCORES_PER_TASK).enumerate();
            let has_nan = |(at, part)| dispatch(isa, AnyNan { part }).then_some(at);
            let part: usize = parts.find_map_first(has_nan)?;
            let start = part * SCORES_PER_TASK;
            let index = start + scores[start..].iter().position(|s| s.is_nan())?;
            Some(Error::NanScore { array, index })
        })
    });
    nan.map_or(Ok(()), Err)
}
