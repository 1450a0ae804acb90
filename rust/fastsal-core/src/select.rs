//! Which weights go: exact selection of the `k` smallest scores over many arrays, and `N:M` groups.
//!
//! Scores are read through a key that orders floats as integers, and are neither sorted nor copied. A
//! sample of them brackets the threshold; one read counts what lies below and sets the few inside
//! (about one in a hundred) aside, among which it is found. Where the bracket misses, or floors cap
//! the arrays, a histogram over the key's upper half finds the half of the threshold and one over the
//! lower half the rest. A last read writes the mask. Equal scores are told apart by position (first array first, first
//! weight first), so the count is exact and the mask does not depend on the number of threads.

use rayon::prelude::*;

use crate::error::{check_length, Error, Result};
use crate::parallel;
use crate::simd::{dispatch, Isa, Kernel, Simd};

/// Scores of one task.
const CHUNK: usize = 1 << 18;
const BINS: usize = 1 << 16;

/// Where an order of scores is cut: smaller keys go, and the first `ties` of those equal to `key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threshold {
    key: u32,
    ties: usize,
    /// How many scores have the key; all of them go when `ties` says so.
    equal: usize,
}

impl Threshold {
    /// Nothing goes.
    const NOTHING: Self = Self { key: 0, ties: 0, equal: 0 };
}

/// Order of floats as integers; both zeros are one, NaN lies above infinity.
#[inline(always)]
fn key(score: f32) -> u32 {
    // Adding zero turns -0 into +0.
    let bits = (score + 0.0).to_bits();
    // All bits of a negative number flip, the sign of a positive one.
    bits ^ (((bits as i32) >> 31) as u32 | 0x8000_0000)
}

/// The score that a key stands for.
pub fn score(key: u32) -> f32 {
    f32::from_bits(if key & 0x8000_0000 == 0 { !key } else { key ^ 0x8000_0000 })
}

/// A stretch of one array.
#[derive(Clone, Copy)]
struct Part<'a> {
    scores: &'a [f32],
    /// Keys from here on are not counted.
    below: u64,
}

/// The `k` smallest scores over all arrays, as one threshold per array; and the threshold's score.
///
/// `floors[a]` is the least number of weights that array `a` keeps: its largest scores are out of
/// the selection. An empty slice stands for no floors.
///
/// # Errors
/// [`Error::NanScore`]; [`Error::Value`] when `k` is more than the floors leave.
pub fn smallest(
    arrays: &[&[f32]],
    k: usize,
    floors: &[usize],
) -> Result<(Vec<Threshold>, Option<f32>)> {
    check_nan(arrays)?;
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
        let got = format!("{k} of {available} prunable weights");
        return Err(Error::Value { what: "k", got, expected: "at most what the floors leave" });
    }
    if k == 0 {
        return Ok((vec![Threshold::NOTHING; arrays.len()], None));
    }
    let all = parallel::run(|| select(arrays, k, &caps));
    // Equal scores go in the order of the arrays, as far as each array's floor allows.
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
        let parts = kept.par_chunks_mut(CHUNK).zip(scores.par_chunks(CHUNK));
        if ties == 0 || ties == equal {
            let least = u64::from(cut) + u64::from(ties > 0);
            parts.for_each(|(kept, scores)| {
                for (kept, s) in kept.iter_mut().zip(scores) {
                    *kept = u64::from(key(*s)) >= least;
                }
            });
            return;
        }
        // Some of the equal scores go: each part must know how many stand before it.
        let counts: Vec<usize> = scores
            .par_chunks(CHUNK)
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

/// Keep the `n` largest of every `m` scores along the middle axis of `[outer, width, inner]`.
///
/// A short last group of `r` scores keeps `ceil(r n / m)`. Among equal scores the first go.
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
    let (outer, width, inner) = shape;
    check_length("scores", scores.len(), outer * width * inner)?;
    check_length("kept", kept.len(), scores.len())?;
    check_nan(&[scores])?;
    if n > m || m == 0 {
        let got = format!("{n}:{m}");
        return Err(Error::Value { what: "pattern", got, expected: "N:M with N <= M and M >= 1" });
    }
    let row = (width * inner).max(1);
    parallel::run(|| {
        kept.par_chunks_mut(row).zip(scores.par_chunks(row)).for_each_init(
            || Vec::with_capacity(m),
            |order, (kept, scores)| {
                kept.fill(false);
                for i in 0..inner {
                    for first in (0..width).step_by(m) {
                        let size = m.min(width - first);
                        order.clear();
                        order.extend((first..first + size).map(|w| w * inner + i));
                        // Stable: among equal scores the later positions come first, and stay.
                        order.reverse();
                        order.sort_by_key(|at| std::cmp::Reverse(key(scores[*at])));
                        for at in &order[..(size * n).div_ceil(m)] {
                            kept[*at] = true;
                        }
                    }
                }
            },
        );
    });
    Ok(())
}

/// How many scores have each upper half of the key; or, of those with the upper half `upper`, each
/// lower half. Keys from `below` on are not counted.
///
/// Such counts add up over arrays that lie on several machines: two of them find a threshold that
/// nobody needs all scores for.
///
/// # Errors
/// [`Error::NanScore`].
pub fn count_keys(scores: &[f32], upper: Option<u32>, below: u64) -> Result<Vec<u64>> {
    check_nan(&[scores])?;
    let parts: Vec<Part<'_>> = scores.chunks(CHUNK).map(|scores| Part { scores, below }).collect();
    Ok(parallel::run(|| match upper {
        None => histogram(&parts, |k| Some((k >> 16) as usize)),
        Some(upper) => histogram(&parts, |k| (k >> 16 == upper).then_some((k & 0xffff) as usize)),
    }))
}

/// The threshold of one array: keys below `key` go, and the first `ties` of those equal to it.
pub fn threshold(scores: &[f32], key: u32, ties: usize) -> Threshold {
    Threshold { key, ties, equal: parallel::run(|| count_equal(scores, key)) }
}

struct AnyNan<'a> {
    part: &'a [f32],
}

impl Kernel<f32> for AnyNan<'_> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd<T = f32>>(self) -> bool {
        // A fold without an early exit vectorises.
        self.part.iter().fold(false, |nan, s| nan | s.is_nan())
    }
}

fn check_nan(arrays: &[&[f32]]) -> Result<()> {
    let isa = Isa::best();
    let nan = parallel::run(|| {
        arrays.par_iter().enumerate().find_map_first(|(array, scores)| {
            let part =
                scores.par_chunks(CHUNK).position_first(|part| dispatch(isa, AnyNan { part }))?;
            let start = part * CHUNK;
            let index = start + scores[start..].iter().position(|s| s.is_nan())?;
            Some(Error::NanScore { array, index })
        })
    });
    nan.map_or(Ok(()), Err)
}

/// The threshold below which `k >= 1` scores go, each array capped (see [`smallest`]).
fn select(arrays: &[&[f32]], k: usize, caps: &[Option<Threshold>]) -> Threshold {
    if k == 0 {
        return Threshold::NOTHING;
    }
    let parts: Vec<Part<'_>> = arrays
        .iter()
        .zip(caps)
        .flat_map(|(scores, cap)| {
            let below = cap.map_or(u64::MAX, |c| u64::from(c.key));
            scores.chunks(CHUNK).map(move |scores| Part { scores, below })
        })
        .collect();
    let capped = |bin: &dyn Fn(u32) -> Option<usize>, counts: &mut [u64]| {
        for cap in caps.iter().flatten() {
            if let Some(bin) = bin(cap.key) {
                counts[bin] += cap.ties as u64;
            }
        }
    };
    if caps.iter().all(Option::is_none) {
        if let Some(found) = bracketed(&parts, k) {
            return found;
        }
    }
    let mut counts = histogram(&parts, |k| Some((k >> 16) as usize));
    capped(&|k| Some((k >> 16) as usize), &mut counts);
    let (upper, left) = find(&counts, k as u64);
    let lower_bin = |k: u32| (k >> 16 == upper as u32).then_some((k & 0xffff) as usize);
    let mut counts = histogram(&parts, lower_bin);
    capped(&lower_bin, &mut counts);
    let (lower, ties) = find(&counts, left);
    let key = (upper << 16 | lower) as u32;
    Threshold { key, ties: ties as usize, equal: counts[lower] as usize }
}

/// The threshold by way of a bracket around it; `None` where there are too few scores for that, or
/// the bracket misses.
fn bracketed(parts: &[Part<'_>], k: usize) -> Option<Threshold> {
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

    let isa = Isa::best();
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

/// How many keys lie below a bracket, and which lie inside.
struct Bracket<'a> {
    scores: &'a [f32],
    low: u32,
    high: u32,
}

impl Kernel<f32> for Bracket<'_> {
    type Output = (usize, Vec<u32>);
    #[inline(always)]
    fn run<S: Simd<T = f32>>(self) -> Self::Output {
        const LANES: usize = 32;
        let Self { scores, low, high } = self;
        let width = high - low;
        let (mut below, mut inside) = (0usize, Vec::new());
        let (chunks, rest) = scores.as_chunks::<LANES>();
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

/// How many keys fall into each bin.
fn histogram(parts: &[Part<'_>], bin: impl Fn(u32) -> Option<usize> + Sync) -> Vec<u64> {
    let share = parts.len().div_ceil(4 * rayon::current_num_threads()).max(1);
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

/// The bin that holds the `k`-th key, and how many of the `k` lie in it.
fn find(counts: &[u64], k: u64) -> (usize, u64) {
    let mut left = k;
    for (bin, count) in counts.iter().enumerate() {
        if left <= *count {
            return (bin, left);
        }
        left -= count;
    }
    (counts.len() - 1, 0)
}

fn count_equal(scores: &[f32], cut: u32) -> usize {
    scores.par_chunks(CHUNK).map(|part| part.iter().filter(|s| key(**s) == cut).count()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::random;
    use proptest::prelude::*;

    /// Sort everything, then cut.
    fn slow(arrays: &[Vec<f32>], k: usize, floors: &[usize]) -> Vec<Vec<bool>> {
        let mut all: Vec<(f32, usize, usize)> = Vec::new();
        for (a, scores) in arrays.iter().enumerate() {
            let mut own: Vec<_> =
                scores.iter().enumerate().map(|(i, s)| (*s + 0.0, a, i)).collect();
            own.sort_by(|x, y| x.0.total_cmp(&y.0).then(x.2.cmp(&y.2)));
            own.truncate(scores.len() - floors.get(a).map_or(0, |f| (*f).min(scores.len())));
            all.extend(own);
        }
        all.sort_by(|x, y| x.0.total_cmp(&y.0).then((x.1, x.2).cmp(&(y.1, y.2))));
        let mut kept: Vec<Vec<bool>> = arrays.iter().map(|a| vec![true; a.len()]).collect();
        for (_, a, i) in &all[..k] {
            kept[*a][*i] = false;
        }
        kept
    }

    fn fast(arrays: &[Vec<f32>], k: usize, floors: &[usize]) -> Result<Vec<Vec<bool>>> {
        let views: Vec<&[f32]> = arrays.iter().map(Vec::as_slice).collect();
        let (thresholds, _) = smallest(&views, k, floors)?;
        let masks = views.iter().zip(thresholds).map(|(scores, threshold)| {
            let mut kept = vec![false; scores.len()];
            write_mask(scores, threshold, &mut kept).map(|()| kept)
        });
        masks.collect()
    }

    proptest! {
        #[test]
        fn equals_sorting(
            // Few values, so that there are ties; both zeros, both infinities.
            arrays in prop::collection::vec(
                prop::collection::vec(prop::sample::select(vec![-0.0f32, 0.0, -1.5, 1.0, 2.0, 1e-40, f32::INFINITY, f32::NEG_INFINITY, 3.25]), 0..40), 1..5),
            share in 0.0f64..=1.0,
            floor in prop::collection::vec(0usize..6, 5),
        ) {
            for floors in [&[][..], &floor[..arrays.len()]] {
                let left: usize = arrays.iter().enumerate()
                    .map(|(a, s)| s.len() - floors.get(a).map_or(0, |f| (*f).min(s.len()))).sum();
                let k = (share * left as f64).round() as usize;
                prop_assert_eq!(fast(&arrays, k, floors).expect("mask"), slow(&arrays, k, floors));
            }
        }

        #[test]
        fn keys_order_as_floats(a in any::<f32>(), b in any::<f32>()) {
            if !a.is_nan() && !b.is_nan() {
                prop_assert_eq!(key(a).cmp(&key(b)), a.partial_cmp(&b).expect("order"));
                prop_assert_eq!(score(key(a)), a);
            }
        }
    }

    #[test]
    fn large_arrays_with_and_without_ties() {
        let arrays: Vec<Vec<f32>> = [3 * CHUNK + 5, 100, CHUNK]
            .iter()
            .enumerate()
            .map(|(s, n)| {
                random(s as u64, *n).into_iter().map(|x| (x * 1e3).round() as f32).collect()
            })
            .collect();
        for k in [1, 1000, CHUNK, 4 * CHUNK + 104] {
            let kept = fast(&arrays, k, &[]).expect("mask");
            assert_eq!(kept.iter().flatten().filter(|k| !**k).count(), k);
            assert!(kept == slow(&arrays, k, &[]));
        }
    }

    proptest! {
        #[test]
        fn counts_find_the_threshold(
            scores in prop::collection::vec(prop::sample::select(vec![-0.0f32, 0.0, -1.5, 1.0, 2.0, 1e-40, 3.25]), 1..60),
            split in 0usize..60,
            share in 0.0f64..=1.0,
        ) {
            let k = ((share * scores.len() as f64) as usize).max(1);
            let (a, b) = scores.split_at(split.min(scores.len()));
            let add = |upper| {
                let (a, b) = (count_keys(a, upper, u64::MAX), count_keys(b, upper, u64::MAX));
                let (a, b) = (a.expect("counts"), b.expect("counts"));
                a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<u64>>()
            };
            let (upper, left) = find(&add(None), k as u64);
            let (lower, ties) = find(&add(Some(upper as u32)), left);
            let key = (upper << 16 | lower) as u32;
            prop_assert_eq!(threshold(&scores, key, ties as usize), select(&[&scores], k, &[None]));
        }
    }

    #[test]
    fn refuses_nan_and_too_many() {
        let nan = vec![vec![0.0], vec![1.0, f32::NAN]];
        assert_eq!(fast(&nan, 1, &[]), Err(Error::NanScore { array: 1, index: 1 }));
        assert!(fast(&[vec![0.0; 4]], 4, &[1]).is_err());
    }

    #[test]
    fn groups_keep_their_largest() {
        let scores = [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0, 9.0, 8.0];
        let mut kept = [false; 10];
        n_of_m(&scores, (1, 10, 1), 2, 4, &mut kept).expect("kept");
        assert_eq!(kept.map(u8::from), [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]);
        // Groups run along the middle axis, here of stride 2.
        let scores = [1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0];
        let mut kept = [false; 8];
        n_of_m(&scores, (1, 4, 2), 2, 4, &mut kept).expect("kept");
        assert_eq!(kept.map(u8::from), [0, 1, 0, 1, 1, 0, 1, 0]);
        assert!(n_of_m(&scores, (1, 4, 2), 5, 4, &mut kept).is_err());
    }

    #[test]
    fn a_bracket_finds_what_histograms_find() {
        let n = 1 << 20;
        let even: Vec<f32> = random(3, n).iter().map(|x| (x * x) as f32).collect();
        let few: Vec<f32> = even.iter().map(|x| (x * 7.0).floor()).collect();
        // Every sampled score is one; the others spread.
        let unlucky: Vec<f32> =
            even.iter().enumerate().map(|(i, x)| if i % 16 == 0 { 1.0 } else { *x }).collect();
        for (scores, hits) in [(&even, true), (&few, true), (&unlucky, false)] {
            for k in [1, 2, n / 10, n / 2, 9 * n / 10, n - 1, n] {
                let mut sorted: Vec<u32> = scores.iter().map(|s| key(*s)).collect();
                let cut = *sorted.select_nth_unstable(k - 1).1;
                let smaller = sorted.iter().filter(|x| **x < cut).count();
                let equal = sorted.iter().filter(|x| **x == cut).count();
                let expected = Threshold { key: cut, ties: k - smaller, equal };
                let parts: Vec<Part<'_>> =
                    scores.chunks(CHUNK).map(|scores| Part { scores, below: u64::MAX }).collect();
                if let Some(found) = bracketed(&parts, k) {
                    assert_eq!(found, expected);
                } else {
                    assert!(!hits, "k = {k}");
                }
                assert_eq!(select(&[scores], k, &[None]), expected);
            }
        }
    }
}
