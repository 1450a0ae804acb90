use super::n_of_m::keep_in_row;
use super::*;
use crate::keys::count_keys;
use crate::testing::random;
use proptest::prelude::*;

/// Sort everything, then cut.
fn slow(arrays: &[Vec<f32>], k: usize, floors: &[usize]) -> Vec<Vec<bool>> {
    let mut all: Vec<(f32, usize, usize)> = Vec::new();
    for (a, scores) in arrays.iter().enumerate() {
        let mut own: Vec<_> = scores.iter().enumerate().map(|(i, s)| (*s + 0.0, a, i)).collect();
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
    let arrays: Vec<Vec<f32>> = [3 * SCORES_PER_TASK + 5, 100, SCORES_PER_TASK]
        .iter()
        .enumerate()
        .map(|(s, n)| random(s as u64, *n).into_iter().map(|x| (x * 1e3).round() as f32).collect())
        .collect();
    for k in [1, 1000, SCORES_PER_TASK, 4 * SCORES_PER_TASK + 104] {
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
        let (upper, left) = find_bin(&add(None), k as u64);
        let (lower, ties) = find_bin(&add(Some(upper as u32)), left);
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
fn nan_is_found_among_many() {
    for at in [0, 5, (1 << 20) - 1, 700_001] {
        for nan in [f32::NAN, -f32::NAN] {
            let mut scores: Vec<f32> = random(9, 1 << 20).iter().map(|x| *x as f32).collect();
            scores[at] = nan;
            assert_eq!(fast(&[scores], 1000, &[]), Err(Error::NanScore { array: 0, index: at }));
        }
    }
}

#[test]
fn short_groups_are_those_of_sorting() {
    let values = [0.0f32, -0.0, 1.0, 2.0, 0.5, f32::INFINITY, 1e-40, -1.0];
    let scores: Vec<f32> =
        random(4, 960).iter().map(|x| values[(x.abs() * 1e4) as usize % values.len()]).collect();
    for m in [2, 4, 8] {
        for n in 0..=m {
            for width in [m, 3 * m, 15 * 8] {
                let rows = 960 / width * width;
                let (mut kept, mut slow) = (vec![true; rows], vec![true; rows]);
                n_of_m(&scores[..rows], (rows / width, width, 1), n, m, &mut kept).expect("kept");
                for (kept, scores) in slow.chunks_mut(width).zip(scores.chunks(width)) {
                    keep_in_row(scores, (width, 1), (n, m), &mut Vec::new(), kept);
                }
                assert_eq!(kept, slow, "{n}:{m} of {width}");
            }
        }
    }
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
    // A group that is longer than the row is the row, also where sizes have no product.
    for (n, m) in [(2, 9), (1, usize::MAX), (usize::MAX / 2, usize::MAX), (3, usize::MAX / 2)] {
        n_of_m(&scores, (2, 4, 1), n, m, &mut kept).expect("kept");
        let stay = (4 * n as u128).div_ceil(m as u128) as usize;
        assert_eq!(kept.iter().filter(|k| **k).count(), 2 * stay, "{n}:{m}");
    }
}

#[test]
fn a_bracket_finds_what_histograms_find() {
    let n = 1 << 20;
    let even: Vec<f32> = random(3, n).iter().map(|x| (x * x) as f32).collect();
    let few: Vec<f32> = even.iter().map(|x| (x * 7.0).floor()).collect();
    // Every sampled score is one; the others spread.
    let unlucky: Vec<f32> =
        even.iter().enumerate().map(|(i, x)| if i % 16 == 0 { 1.0 } else { *x }).collect();
    // A third has one score, in the middle, at the end, at the start; both zeros are one.
    let dead = |score: f32| -> Vec<f32> {
        let third = |(i, x): (usize, &f32)| if i % 3 == 0 { score } else { *x };
        even.iter().enumerate().map(third).collect()
    };
    let (middle, most, least) = (dead(0.25), dead(2.0), dead(-0.0));
    let cases = [(&even, true), (&few, true), (&middle, true), (&most, true), (&least, true)];
    for (scores, hits) in cases.into_iter().chain([(&unlucky, false)]) {
        for k in [1, 2, n / 10, n / 3, n / 3 + 1, n / 2, 2 * n / 3, 9 * n / 10, n - 1, n] {
            let mut sorted: Vec<u32> = scores.iter().map(|s| key(*s)).collect();
            let cut = *sorted.select_nth_unstable(k - 1).1;
            let smaller = sorted.iter().filter(|x| **x < cut).count();
            let equal = sorted.iter().filter(|x| **x == cut).count();
            let expected = Threshold { key: cut, ties: k - smaller, equal };
            let parts: Vec<Part<'_>> = Part::all(scores, u64::MAX).collect();
            if let Some(found) = bracketed(Isa::best(), &parts, k) {
                assert_eq!(found, expected);
            } else {
                assert!(!hits, "k = {k}");
            }
            assert_eq!(select(&[scores], k, &[None]), expected);
        }
    }
}
