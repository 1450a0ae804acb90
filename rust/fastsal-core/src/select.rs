//! Exact selection of the `k` smallest scores over many arrays, and of `N:M` groups.
//!
//! Scores are read through a key that orders floats as integers, and are neither sorted nor copied. A
//! sample of them brackets the threshold; one pass counts the keys below the bracket and copies the
//! few inside it (about one in a hundred), among which the threshold is found. Where the bracket
//! misses, or floors cap the arrays, a histogram over the upper half of the key finds that half of
//! the threshold and one over the lower half the rest. A last pass writes the mask. Equal scores are
//! ordered by position (first array first, first weight first), so the count is exact and the mask
//! does not depend on the number of threads.

use crate::parallel::prelude::*;

use crate::error::{check_length, Error, Result};
use crate::groups::volume;
use crate::isa::Isa;
use crate::keys::{
    check_nan, count_equal, find_bin, histogram, key, lower_bin, score, upper_bin, Part,
    SCORES_PER_TASK,
};
use crate::parallel;
use crate::simd::{dispatch, Kernel, Simd};

/// A cut through ordered scores: smaller keys are pruned, and the first `ties` of those equal to `key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threshold {
    key: u32,
    ties: usize,
    /// How many scores have the key; all of them are pruned when `ties` is the same.
    equal: usize,
}

impl Threshold {
    /// Prune nothing.
    const NOTHING: Self = Self { key: 0, ties: 0, equal: 0 };
}

/// Find the `k` smallest scores over all arrays: a threshold for each array, and its score.
///
/// `floors[a]` is the least number of weights that array `a` keeps: its largest scores are excluded
/// from the selection. An empty slice means no floors.
///
/// # Errors
/// [`Error::NanScore`]; [`Error::Value`] when `k` is more than the floors allow.
pub fn smallest(
    arrays: &[&[f32]],
    k: usize,
    floors: &[usize],
) -> Result<(Vec<Threshold>, Option<f32>)> {
    check_nan(arrays)?;
    let isa = Isa::chosen()?;
    let caps: Vec<Option<Threshold>> = if floors.is_empty() {
        vec![None; arrays.len()]
    } else {
        check_length("floors", floors.len(), arrays.len())?;
        let cap = |(a, floor): (&&[f32], &usize)| {
            (*floor > 0).then(|| select(isa, &[*a], a.len().saturating_sub(*floor), &[None]))
        };
        parallel::run(|| arrays.par_iter().zip(floors).map(cap).collect())
    };
    let available: usize = arrays
        .iter()
        .enumerate()
        .map(|(a, s)| s.len() - floors.get(a).map_or(0, |f| (*f).min(s.len())))
        .sum();
    if k > available {
        let got = format!("{k} with {available} prunable weights");
        let expected = "at most the number of weights that the floors allow to prune";
        return Err(Error::Value { what: "k", got, expected });
    }
    if k == 0 {
        return Ok((vec![Threshold::NOTHING; arrays.len()], None));
    }
    let all = parallel::run(|| select(isa, arrays, k, &caps));
    // Equal scores are pruned in the order of the arrays, as far as the floor of each allows.
    let mut left = all.ties;
    let thresholds = arrays
        .iter()
        .zip(&caps)
        .map(|(a, cap)| {
            if let Some(cap) = cap.filter(|c| c.key < all.key) {
                return cap;
            }
            if left == 0 {
                return Threshold { ties: 0, ..all };
            }
            let is_alone = arrays.len() == 1 && cap.is_none();
            let equal =
                if is_alone { all.equal } else { parallel::run(|| count_equal(a, all.key)) };
            let allowed = cap.filter(|c| c.key == all.key).map_or(equal, |c| c.ties);
            let ties = allowed.min(left);
            left -= ties;
            Threshold { key: all.key, ties, equal }
        })
        .collect();
    Ok((thresholds, Some(score(all.key))))
}

/// Write `kept` (true = kept) for one array.
///
/// # Errors
/// [`Error::Length`] when the arrays differ in length.
pub fn write_mask(scores: &[f32], threshold: Threshold, kept: &mut [bool]) -> Result<()> {
    check_length("kept", kept.len(), scores.len())?;
    let Threshold { key: cut, ties, equal } = threshold;
    parallel::run(|| {
        let parts = kept.par_chunks_mut(SCORES_PER_TASK).zip(scores.par_chunks(SCORES_PER_TASK));
        if ties == 0 || ties == equal {
            let least = u64::from(cut) + u64::from(ties > 0);
            parts.for_each(|(kept, scores)| {
                for (kept, s) in kept.iter_mut().zip(scores) {
                    *kept = u64::from(key(*s)) >= least;
                }
            });
            return;
        }
        // Some of the equal scores are pruned: each part needs the number of those before it.
        let counts: Vec<usize> = scores
            .par_chunks(SCORES_PER_TASK)
            .map(|part| part.iter().filter(|s| key(**s) == cut).count())
            .collect();
        let before = counts.iter().scan(0, |sum, c| {
            let before = *sum;
            *sum += c;
            Some(before)
        });
        let before: Vec<usize> = before.collect();
        parts.zip(before).for_each(|((kept, scores), mut seen)| {
            for (kept, s) in kept.iter_mut().zip(scores) {
                let k = key(*s);
                *kept = k > cut || (k == cut && seen >= ties);
                seen += usize::from(k == cut);
            }
        });
    });
    Ok(())
}

/// Return the threshold of one array that prunes keys below `key` and the first `ties` equal to it.
#[must_use]
pub fn threshold(scores: &[f32], key: u32, ties: usize) -> Threshold {
    Threshold { key, ties, equal: parallel::run(|| count_equal(scores, key)) }
}

/// Find the threshold below which `k` scores are pruned, each array capped (see [`smallest`]).
fn select(isa: Isa, arrays: &[&[f32]], k: usize, caps: &[Option<Threshold>]) -> Threshold {
    if k == 0 {
        return Threshold::NOTHING;
    }
    let parts: Vec<Part<'_>> = arrays
        .iter()
        .zip(caps)
        .flat_map(|(scores, cap)| Part::all(scores, cap.map_or(u64::MAX, |c| u64::from(c.key))))
        .collect();
    let capped = |bin: &dyn Fn(u32) -> Option<usize>, counts: &mut [u64]| {
        for cap in caps.iter().flatten() {
            if let Some(bin) = bin(cap.key) {
                counts[bin] += cap.ties as u64;
            }
        }
    };
    if caps.iter().all(Option::is_none) {
        if let Some(found) = bracketed(isa, &parts, k) {
            return found;
        }
    }
    let mut counts = histogram(&parts, upper_bin);
    capped(&upper_bin, &mut counts);
    let (upper, left) = find_bin(&counts, k as u64);
    let lower_bin = |key: u32| lower_bin(key, upper as u32);
    let mut counts = histogram(&parts, lower_bin);
    capped(&lower_bin, &mut counts);
    let (lower, ties) = find_bin(&counts, left);
    let key = (upper << 16 | lower) as u32;
    Threshold { key, ties: ties as usize, equal: counts[lower] as usize }
}

/// Find the threshold by a bracket around it; `None` where there are too few scores for that, or the
/// bracket misses.
fn bracketed(isa: Isa, parts: &[Part<'_>], k: usize) -> Option<Threshold> {
    const SAMPLE: usize = 1 << 16;
    let total: usize = parts.iter().map(|p| p.scores.len()).sum();
    if total < 8 * SAMPLE {
        return None;
    }
    let step = total / SAMPLE;
    let mut sample: Vec<u32> =
        parts.iter().flat_map(|p| p.scores.iter().step_by(step).map(|s| key(*s))).collect();
    sample.sort_unstable();
    // Four standard deviations of a random sample's rank. Which scores are sampled is fixed, so an
    // unlucky order costs the histograms, never the result.
    let (m, share) = (sample.len() as f64, k as f64 / total as f64);
    let rank = share * m;
    let around = 4.0 * (m * share * (1.0 - share)).sqrt() + 2.0;
    let low = if rank > around { sample[(rank - around) as usize] } else { 0 };
    let high = sample.get((rank + around) as usize).copied().unwrap_or(u32::MAX);

    let found: Vec<(usize, Vec<u32>)> = parts
        .par_iter()
        .map(|part| dispatch(isa, Bracket { scores: part.scores, low, high }))
        .collect();
    let below: usize = found.iter().map(|(below, _)| below).sum();
    let mut inside: Vec<u32> = found.into_iter().flat_map(|(_, inside)| inside).collect();
    if k <= below || k > below + inside.len() {
        return None;
    }
    let cut = *inside.select_nth_unstable(k - below - 1).1;
    let smaller = inside.iter().filter(|k| **k < cut).count();
    let equal = inside.iter().filter(|k| **k == cut).count();
    Some(Threshold { key: cut, ties: k - below - smaller, equal })
}

/// Counts the keys below a bracket and collects those inside.
struct Bracket<'a> {
    scores: &'a [f32],
    low: u32,
    high: u32,
}

impl Kernel<f32> for Bracket<'_> {
    type Output = (usize, Vec<u32>);
    #[inline(always)]
    fn run<S: Simd<T = f32>>(self, _simd: S) -> Self::Output {
        const AT_A_TIME: usize = 32;
        let Self { scores, low, high } = self;
        let width = high - low;
        let (mut below, mut inside) = (0usize, Vec::new());
        let (chunks, rest) = scores.as_chunks::<AT_A_TIME>();
        for scores in chunks {
            let keys = scores.map(key);
            let (mut less, mut within) = (0u32, 0u32);
            for k in keys {
                less += u32::from(k < low);
                within += u32::from(k.wrapping_sub(low) <= width);
            }
            below += less as usize;
            if within > 0 {
                inside.extend(keys.iter().filter(|k| k.wrapping_sub(low) <= width));
            }
        }
        for k in rest.iter().map(|s| key(*s)) {
            below += usize::from(k < low);
            inside.extend((k.wrapping_sub(low) <= width).then_some(k));
        }
        (below, inside)
    }
}

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
    let row = (width * inner).max(1);
    parallel::run(|| {
        kept.par_chunks_mut(row).zip(scores.par_chunks(row)).for_each_init(
            // A group is at most a row, however large it may be.
            || Vec::with_capacity(m.min(width)),
            |order, (kept, scores)| {
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
            },
        );
    });
    Ok(())
}

#[cfg(test)]
mod tests;
