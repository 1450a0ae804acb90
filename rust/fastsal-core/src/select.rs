//! Which weights go: exact selection of the `k` smallest scores over many arrays, and `N:M` groups.
//!
//! No sort and no copy: scores are read through a key that orders floats as integers. A histogram
//! over the key's upper half finds the half of the threshold, one over the lower half the rest, a
//! third read writes the mask. Equal scores are told apart by position (first array first, first
//! weight first), so the count is exact and the mask does not depend on the number of threads.

use rayon::prelude::*;

use crate::error::{check_length, Error, Result};
use crate::parallel;

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
fn score(key: u32) -> f32 {
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
            let equal = parallel::run(|| count_equal(a, all.key));
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

fn check_nan(arrays: &[&[f32]]) -> Result<()> {
    let nan = parallel::run(|| {
        arrays.par_iter().enumerate().find_map_first(|(array, scores)| {
            let part = scores.par_chunks(CHUNK).position_first(|part| {
                // A fold without an early exit vectorises.
                part.iter().fold(false, |nan, s| nan | s.is_nan())
            })?;
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
}
