use super::*;
use crate::statistics::{Packed, Statistics};
use crate::testing::{random_statistics, relative_error};

/// Inverse by Gauss-Jordan elimination with row exchanges.
fn slow_inverse(mut a: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let n = a.len();
    for (i, row) in a.iter_mut().enumerate() {
        row.extend((0..n).map(|j| f64::from(u8::from(i == j))));
    }
    for c in 0..n {
        let pivot = (c..n).max_by(|x, y| a[*x][c].abs().total_cmp(&a[*y][c].abs())).expect("row");
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
    for (len, block, n) in
        [(1, 1, 3), (70, 64, 100), (200, 64, 20), (130, 130, 90), (37, 9, 5), (430, 400, 90)]
    {
        let layout = Layout::new(len, block).expect("layout");
        let packed = random_statistics(7, layout, n);
        let kept: Vec<bool> = (0..len).map(|i| i % 3 != 1).collect();
        for (kept, damping) in [(None, 1e-3), (Some(kept.as_slice()), 0.1)] {
            let packed = Packed::F64(&packed);
            let statistics = Statistics::new(layout, packed, n as f64, kept).expect("statistics");
            let damped = statistics.damped(damping).expect("damped");
            let mut dense = vec![0.0; layout.dense_len()];
            statistics.blocks(&mut dense).expect("blocks");
            let (mut diagonal, mut full) = (vec![0.0; len], dense.clone());
            let report = inverse_diagonal(damped, &mut diagonal).expect("diagonal");
            assert!(report.failed.is_empty());
            inverse(damped, &mut full).expect("inverse");
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
    let layout = Layout::new(200, 64).expect("layout");
    let mut packed = random_statistics(7, layout, 10);
    packed[layout.packed_range(2).start] = -1e9;
    let packed = Packed::F64(&packed);
    let statistics = Statistics::new(layout, packed, 10.0, None).expect("statistics");
    let damped = statistics.damped(1e-3).expect("damped");
    let mut out = vec![0.0; 200];
    let report = inverse_diagonal(damped, &mut out).expect("report");
    assert_eq!(report.failed, [2]);
    assert!(inverse_diagonal(damped, &mut out[1..]).is_err());
    assert!(out[128..192].iter().all(|x| x.is_nan()) && out[..128].iter().all(|x| *x > 0.0));
    for damping in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(statistics.damped(damping).is_err());
    }
}

#[test]
fn lanes_of_small_blocks_are_the_diagonals_of_the_inverse() {
    let sizes = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 50, 63, 64];
    for isa in Isa::available() {
        for (k, block) in sizes.into_iter().enumerate() {
            // Every number of blocks of a vector, and a short one after them.
            let (blocks, samples) = (k % 10 + 1, 2 * block);
            let layout = Layout::new(blocks * block + block / 3, block).expect("layout");
            let packed = random_statistics(k as u64, layout, samples);
            let kept: Vec<bool> = (0..layout.len()).map(|i| i % 5 != 1).collect();
            for kept in [None, Some(kept.as_slice())] {
                let packed = Packed::F64(&packed);
                let statistics = Statistics::new(layout, packed, samples as f64, kept);
                let damped = statistics.expect("statistics").damped(1e-3).expect("damped");
                let mut full = vec![0.0; layout.dense_len()];
                inverse(damped, &mut full).expect("inverse");
                let mut out = vec![0.0; layout.len()];
                let report = small_blocks(isa, damped, &mut out);
                assert!(report.failed.is_empty());
                for (j, x) in out.iter().enumerate() {
                    let (b, i) = (j / block, j % block);
                    let want = full[(b * block + i) * block + i];
                    assert!((x / want - 1.0).abs() < 1e-10, "{isa:?} {block}: {x} {want}");
                }
                let mut scratch = Scratch::default();
                for b in 0..layout.blocks() {
                    scratch.reserve(block, layout.blocks()).expect("room");
                    let want = damped.invert(isa, b, &mut scratch).expect("inverse");
                    assert!((report.sensitivity[b] - want).abs() <= 1e-10 * want);
                }
            }
        }
    }
}

#[test]
fn a_small_block_does_not_depend_on_those_beside_it() {
    for isa in Isa::available() {
        for (block, blocks, last) in
            [(8, 19, 3), (16, 9, 15), (30, 11, 1), (64, 10, 63), (72, 3, 17), (80, 2, 64)]
        {
            let layout = Layout::new(blocks * block + last, block).expect("layout");
            let mut packed = random_statistics(3, layout, 5);
            let bad = blocks / 2;
            packed[layout.packed_range(bad).start] = f64::NAN;
            let diagonal = |layout: Layout, packed: &[f64]| {
                let statistics = Statistics::new(layout, Packed::F64(packed), 5.0, None);
                let damped = statistics.expect("statistics").damped(1e-8).expect("damped");
                let mut out = vec![0.0; layout.len()];
                let report = inverse_diagonal_with(isa, damped, &mut out).expect("diagonal");
                let bits: Vec<u64> = out.iter().map(|x| x.to_bits()).collect();
                (bits, report)
            };
            let (all, report) = diagonal(layout, &packed);
            assert_eq!(report.failed, [bad]);
            for b in 0..layout.blocks() {
                let alone = Layout::new(layout.size(b), block).expect("layout");
                let (own, own_report) = diagonal(alone, &packed[layout.packed_range(b)]);
                assert!(own == all[layout.range(b)], "{isa:?}: {b} of {block}");
                assert_eq!(own_report.sensitivity[0], report.sensitivity[b]);
            }
        }
    }
}
