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
        assert!(each_alone(damped, &weights, groups, n, &mut kept).expect("n of m").is_empty());
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
