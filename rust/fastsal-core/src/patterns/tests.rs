use super::*;
use crate::inverse::inverse;
use crate::statistics::{Packed, Statistics};
use crate::testing::{random_f32, random_statistics};
use crate::Layout;

/// `θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2` by Gaussian elimination, over the dense inverse of all blocks.
fn slow_cost(dense: &[Vec<f64>], theta: &[f64], out: &[usize]) -> f64 {
    let n = out.len();
    let mut a: Vec<Vec<f64>> = out
        .iter()
        .map(|i| out.iter().map(|j| dense[*i][*j]).chain([theta[*i]]).collect())
        .collect();
    for c in 0..n {
        for r in c + 1..n {
            let f = a[r][c] / a[c][c];
            let above = a[c].clone();
            for (x, y) in a[r].iter_mut().zip(&above).skip(c) {
                *x -= f * y;
            }
        }
    }
    let mut x = vec![0.0; n];
    for r in (0..n).rev() {
        let known: f64 = (r + 1..n).map(|k| a[r][k] * x[k]).sum();
        x[r] = (a[r][n] - known) / a[r][r];
    }
    out.iter().zip(&x).map(|(i, x)| theta[*i] * x).sum::<f64>() / 2.0
}

#[test]
fn the_cheapest_choice_of_each_group_alone_stays_out() {
    for (outer, width, inner, block, m, n) in
        [(3, 8, 1, 8, 4, 2), (2, 10, 3, 7, 4, 2), (4, 6, 9, 64, 4, 1), (1, 17, 2, 16, 8, 4)]
    {
        let layout = Layout::new(outer * width * inner, block).expect("layout");
        let groups = Groups::new((outer, width, inner), m).expect("groups");
        let samples = 30;
        let packed = random_statistics(5, layout, samples);
        let weights = random_f32(6, layout.len());
        let theta: Vec<f64> = weights.iter().map(|x| f64::from(*x)).collect();
        let statistics = Statistics::new(layout, Packed::F64(&packed), samples as f64, None);
        let damped = statistics.expect("statistics").damped(1e-2).expect("damped");
        let mut full = vec![0.0; layout.dense_len()];
        inverse(damped, &mut full).expect("inverse");
        let mut dense = vec![vec![0.0; layout.len()]; layout.len()];
        for i in 0..layout.len() {
            for j in 0..layout.len() {
                let (b, size) = (i / layout.block(), layout.block());
                if j / size == b {
                    dense[i][j] = full[(b * size + i % size) * size + j % size];
                }
            }
        }
        let mut kept = vec![false; layout.len()];
        let alone =
            |window: &Window<'_>, _: &mut Workspace, kept: &mut [bool]| window.choose(n, kept);
        let failed = for_each_window(damped, &weights, groups, &mut kept, alone);
        assert!(failed.expect("n of m").is_empty());
        let mut costs = vec![0.0; layout.len()];
        group_costs(damped, &weights, groups, &mut costs).expect("costs");
        for o in 0..outer {
            for first in (0..width).step_by(m) {
                for i in 0..inner {
                    let members: Vec<usize> = (first..width.min(first + m))
                        .map(|w| (o * width + w) * inner + i)
                        .collect();
                    let stay = (members.len() * n).div_ceil(m);
                    let choose = |bits: usize| -> Vec<usize> {
                        let chosen = members.iter().enumerate();
                        chosen.filter(|(k, _)| bits & 1 << k != 0).map(|(_, j)| *j).collect()
                    };
                    let least = (0..1usize << members.len())
                        .filter(|b| b.count_ones() as usize == members.len() - stay)
                        .map(|bits| slow_cost(&dense, &theta, &choose(bits)))
                        .fold(f64::INFINITY, f64::min);
                    let out: Vec<usize> = members.iter().copied().filter(|j| !kept[*j]).collect();
                    assert_eq!(out.len(), members.len() - stay);
                    let found = slow_cost(&dense, &theta, &out);
                    assert!((found - least).abs() <= 1e-9 * least.max(1e-12));
                    let whole = slow_cost(&dense, &theta, &members);
                    for j in &members {
                        assert!((f64::from(costs[*j]) / whole - 1.0).abs() < 1e-5);
                    }
                }
            }
        }
    }
}

#[test]
fn bad_arguments_are_refused() {
    let layout = Layout::new(12, 4).expect("layout");
    let packed = vec![0.0f64; layout.packed_len()];
    let statistics = Statistics::new(layout, Packed::F64(&packed), 1.0, None);
    let damped = statistics.expect("statistics").damped(1.0).expect("damped");
    let mut kept = [false; 12];
    let mut run = |width, size, n| {
        let groups = Groups::new((1, width, 1), size)?;
        n_of_m(damped, &[1.0f32; 12], groups, n, &mut kept)
    };
    assert!(run(12, 4, 2).is_ok());
    assert!(run(11, 4, 2).is_err() && run(12, 9, 2).is_err() && run(12, 4, 5).is_err());
    assert!(run(12, 0, 0).is_err());
}

#[test]
fn rows_of_whole_blocks_do_not_depend_on_each_other() {
    let (outer, width, inner, block, samples) = (12, 101, 3, 101, 20);
    let row = width * inner;
    let run = |first: usize, rows: usize| {
        let layout = Layout::new(outer * row, block).expect("layout");
        let (packed, weights) =
            (random_statistics(5, layout, samples), random_f32(6, layout.len()));
        let part = Layout::new(rows * row, block).expect("layout");
        let start = layout.packed_range(first * row / block).start;
        let packed = Packed::F64(&packed[start..start + part.packed_len()]);
        let statistics = Statistics::new(part, packed, samples as f64, None);
        let damped = statistics.expect("statistics").damped(1e-2).expect("damped");
        let groups = Groups::new((rows, width, inner), 4).expect("groups");
        let weights = &weights[first * row..(first + rows) * row];
        let (mut kept, mut costs) = (vec![false; part.len()], vec![0.0; part.len()]);
        assert!(n_of_m(damped, weights, groups, 2, &mut kept).expect("n of m").is_empty());
        assert!(group_costs(damped, weights, groups, &mut costs).expect("costs").is_empty());
        (kept, costs)
    };
    // Several windows of four rows.
    assert_eq!(window_len(Groups::new((outer, width, inner), 4).expect("groups"), block), 4 * row);
    let (kept, costs) = run(0, outer);
    for o in 0..outer {
        let alone = run(o, 1);
        assert_eq!(alone.0, kept[o * row..(o + 1) * row]);
        assert_eq!(alone.1, costs[o * row..(o + 1) * row]);
    }
}

#[test]
fn groups_of_blocks_that_cannot_be_factored_lose_their_first_members() {
    let layout = Layout::new(2048 + 16, 8).expect("layout");
    let mut packed = vec![0.0f64; layout.packed_len()];
    let bad = [0, 1, 130, 257];
    bad.iter().for_each(|b| packed[layout.packed_range(*b).start] = -9.0);
    let statistics = Statistics::new(layout, Packed::F64(&packed), 1.0, None);
    let damped = statistics.expect("statistics").damped(1.0).expect("damped");
    let groups = Groups::new((258, 8, 1), 4).expect("groups");
    let (weights, mut kept) = (random_f32(6, layout.len()), vec![false; layout.len()]);
    let mut costs = vec![0.0; layout.len()];
    assert_eq!(n_of_m(damped, &weights, groups, 2, &mut kept).expect("n of m"), bad);
    assert_eq!(group_costs(damped, &weights, groups, &mut costs).expect("costs"), bad);
    for b in 0..layout.blocks() {
        let part = layout.range(b);
        assert_eq!(costs[part.clone()].iter().all(|x| x.is_nan()), bad.contains(&b));
        if bad.contains(&b) {
            assert_eq!(kept[part], [false, false, true, true, false, false, true, true]);
        }
    }
}
