//! Exact selection of the `k` smallest scores over many arrays, and of `N:M` groups (`n_of_m`).
//!
//! Scores are read through a key that orders floats as integers, and are neither sorted nor copied. A
//! sample of them brackets the threshold; one pass looks for NaN, counts the keys below the bracket
//! and copies the few inside it (about one in a hundred), among which the threshold is found. Of the
//! key that is most frequent in the bracket, as that of dead weights may be, scores are only counted.
//! Where the bracket misses, or floors cap the arrays, a histogram over the upper half of the key
//! finds that half of the threshold and one over the lower half the rest. A last pass writes the mask.
//! Equal scores are ordered by position (first array first, first weight first), so the count is exact
//! and the mask does not depend on the number of threads.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop)]

mod n_of_m;

use crate::parallel::prelude::*;

use crate::error::{check_length, Error, Result};
use crate::isa::Isa;
use crate::keys::{
    check_nan, count_equal, equal_in, find_bin, histogram, key, lower_bin, score, upper_bin, Part,
    SCORES_PER_TASK,
};
use crate::parallel;
use crate::simd::{dispatch, Kernel, Simd, PADDING};
pub use n_of_m::n_of_m;
pub(crate) use n_of_m::share;

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
    let isa = Isa::chosen()?;
    let parts: Vec<Part<'_>> = arrays.iter().flat_map(|a| Part::all(a, u64::MAX)).collect();
    let total: usize = arrays.iter().map(|a| a.len()).sum();
    let found = if floors.is_empty() && k <= total {
        parallel::run(|| bracketed(isa, &parts, k))
    } else {
        None
    };
    if found.is_none() {
        check_nan(arrays)?;
    }
    let caps: Vec<Option<Threshold>> = if floors.is_empty() {
        vec![None; arrays.len()]
    } else {
        check_length("floors", floors.len(), arrays.len())?;
        let cap = |(a, floor): (&&[f32], &usize)| {
            (*floor > 0).then(|| select(&[*a], a.len().saturating_sub(*floor), &[None]))
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
    let all = found.unwrap_or_else(|| parallel::run(|| select(arrays, k, &caps)));
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
    let Threshold { key: cut_key, ties, equal } = threshold;
    // Scores are ordered like their keys, and both zeros are equal. No score has a key below that of
    // -inf, so that a threshold there prunes nothing.
    let least = key(f32::NEG_INFINITY);
    let (isa, cut) = (Isa::chosen()?, score(cut_key.max(least)));
    parallel::run(|| {
        let parts = kept.par_chunks_mut(SCORES_PER_TASK).zip(scores.par_chunks(SCORES_PER_TASK));
        if ties == 0 || ties == equal {
            let keeps_equal = ties == 0;
            parts
                .for_each(|(kept, scores)| dispatch(isa, Above { scores, cut, keeps_equal, kept }));
            return;
        }
        // Some of the equal scores are pruned: each part needs the number of those before it.
        let counts: Vec<usize> =
            scores.par_chunks(SCORES_PER_TASK).map(|part| equal_in(part, cut_key)).collect();
        let before = counts.iter().scan(0, |sum, c| {
            let before = *sum;
            *sum += c;
            Some(before)
        });
        let before: Vec<(usize, usize)> = before.zip(counts.iter().copied()).collect();
        parts.zip(before).for_each(|((kept, scores), (mut seen, count))| {
            if seen >= ties || seen + count <= ties {
                let keeps_equal = seen >= ties;
                return dispatch(isa, Above { scores, cut, keeps_equal, kept });
            }
            for (kept, s) in kept.iter_mut().zip(scores) {
                *kept = *s > cut || (*s == cut && seen >= ties);
                seen += usize::from(*s == cut);
            }
        });
    });
    Ok(())
}

/// Keeps the scores above a cut, or from it on.
struct Above<'a> {
    scores: &'a [f32],
    cut: f32,
    keeps_equal: bool,
    kept: &'a mut [bool],
}

impl Kernel<f32> for Above<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = f32>>(self, _simd: S) {
        let Self { scores, cut, keeps_equal, kept } = self;
        let pairs = kept.iter_mut().zip(scores);
        if keeps_equal {
            pairs.for_each(|(kept, s)| *kept = *s >= cut);
        } else {
            pairs.for_each(|(kept, s)| *kept = *s > cut);
        }
    }
}

/// Return the threshold of one array that prunes keys below `key` and the first `ties` equal to it.
#[must_use]
pub fn threshold(scores: &[f32], key: u32, ties: usize) -> Threshold {
    // Without ties all equal scores are kept, however many they are.
    let equal = if ties == 0 { 0 } else { parallel::run(|| count_equal(scores, key)) };
    Threshold { key, ties, equal }
}

/// Find the threshold below which `k` scores are pruned, each array capped (see [`smallest`]).
fn select(arrays: &[&[f32]], k: usize, caps: &[Option<Threshold>]) -> Threshold {
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

/// Find the threshold by a bracket around it; `None` where there are too few scores for that, the
/// bracket misses, or a score is NaN.
fn bracketed(isa: Isa, parts: &[Part<'_>], k: usize) -> Option<Threshold> {
    const SAMPLE: usize = 1 << 16;
    let total: usize = parts.iter().map(|p| p.scores.len()).sum();
    if total < 8 * SAMPLE || k == 0 {
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
    let from = if rank > around { (rank - around) as usize } else { 0 };
    let to = ((rank + around) as usize).min(sample.len());
    let low = if from > 0 { sample[from] } else { 0 };
    let high = sample.get(to).copied().unwrap_or(u32::MAX);
    let counted = most_frequent(&sample[from..to]);

    let found: Vec<Inside> = parts
        .par_iter()
        .map(|part| dispatch(isa, Bracket { scores: part.scores, low, high, counted }))
        .collect();
    if found.iter().any(|part| part.has_nan) {
        return None;
    }
    let sum = |of: fn(&Inside) -> usize| found.iter().map(of).sum::<usize>();
    let (below, equal) = (sum(|part| part.below), sum(|part| part.equal));
    let mut others: Vec<u32> = found.into_iter().flat_map(|part| part.others).collect();
    if k <= below || k > below + equal + others.len() {
        return None;
    }
    let smaller = others.iter().filter(|k| **k < counted).count();
    let place = k - below - 1;
    if (smaller..smaller + equal).contains(&place) {
        return Some(Threshold { key: counted, ties: place + 1 - smaller, equal });
    }
    let place = if place < smaller { place } else { place - equal };
    let cut = *others.select_nth_unstable(place).1;
    let smaller = others.iter().filter(|k| **k < cut).count();
    let equal = others.iter().filter(|k| **k == cut).count();
    Some(Threshold { key: cut, ties: place + 1 - smaller, equal })
}

/// Return the most frequent of sorted keys; 0 of none.
fn most_frequent(sorted: &[u32]) -> u32 {
    let runs = sorted.chunk_by(|a, b| a == b);
    runs.max_by_key(|run| run.len()).map_or(0, |run| run[0])
}

/// Counts the scores below a bracket, and collects the keys inside; those of one key are only counted.
///
/// Scores are compared as they are: their keys have the same order, and both zeros are equal.
struct Bracket<'a> {
    scores: &'a [f32],
    low: u32,
    high: u32,
    counted: u32,
}

/// What a bracket has found.
struct Inside {
    below: usize,
    equal: usize,
    others: Vec<u32>,
    has_nan: bool,
}

impl Kernel<f32> for Bracket<'_> {
    type Output = Inside;
    #[inline(always)]
    fn run<S: Simd<T = f32>>(self, _simd: S) -> Inside {
        const AT_A_TIME: usize = 8;
        // No score has a key beyond those of the infinities.
        let (least, largest) = (key(f32::NEG_INFINITY), key(f32::INFINITY));
        let of_key = |k: u32| score(k.clamp(least, largest));
        let (low, high) = (of_key(self.low), of_key(self.high));
        // The key of no score is counted as NaN, which nothing is equal to.
        let counted = if self.counted < least { f32::NAN } else { score(self.counted) };
        let mut found = Inside { below: 0, equal: 0, others: Vec::new(), has_nan: false };
        let chunks = self.scores.chunks_exact(AT_A_TIME * S::W);
        let rest = chunks.remainder();
        // SAFETY: every chunk is some vectors; `_simd` is the proof of the instruction set.
        unsafe {
            let (one, zero) = (1.0, S::zero());
            let (one, low, high) =
                (S::splat(&raw const one), S::splat(&raw const low), S::splat(&raw const high));
            let counted = S::splat(&raw const counted);
            // A part has fewer scores than floats count exactly.
            let (mut below, mut equal, mut nan) = (zero, zero, zero);
            for scores in chunks {
                let mut inside = zero;
                let mut outside = [zero; AT_A_TIME];
                for v in 0..AT_A_TIME {
                    let s = S::load(scores.as_ptr().add(v * S::W));
                    let is_equal = S::where_equal(s, counted, one, zero);
                    let is_below = S::where_less(s, low, one, zero);
                    equal = S::add(equal, is_equal);
                    below = S::add(below, is_below);
                    nan = S::add(nan, S::where_equal(s, s, zero, one));
                    outside[v] = S::where_less(high, s, one, S::add(is_below, is_equal));
                    inside = S::add(inside, S::where_equal(outside[v], zero, one, zero));
                }
                // Calls for more memory are apart from the counters, which they would push out of
                // registers.
                if S::equal(inside, zero).count_ones() as usize == S::W {
                    continue;
                }
                for v in 0..AT_A_TIME {
                    let mut inside = S::equal(outside[v], zero);
                    while inside != 0 {
                        let at = v * S::W + inside.trailing_zeros() as usize;
                        found.others.push(key(scores[at]));
                        inside &= inside - 1;
                    }
                }
            }
            let mut lanes = [[0.0f32; PADDING]; 3];
            S::store(lanes[0].as_mut_ptr(), below);
            S::store(lanes[1].as_mut_ptr(), equal);
            S::store(lanes[2].as_mut_ptr(), nan);
            let [below, equal, nan] =
                lanes.map(|lanes| lanes.iter().map(|count| *count as usize).sum::<usize>());
            (found.below, found.equal, found.has_nan) = (below, equal, nan > 0);
        }
        for s in rest {
            found.has_nan |= s.is_nan();
            if *s < low {
                found.below += 1;
            } else if *s == counted {
                found.equal += 1;
            } else if *s <= high {
                found.others.push(key(*s));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests;
