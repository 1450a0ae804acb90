use super::*;
use crate::inverse::inverse;
use crate::statistics::{Packed, Statistics};
use crate::testing::{random, random_f32, random_statistics};
use crate::Layout;

/// Scores and turns of one block from `H`, rows `block` apart.
fn slow(h: &[f64], block: usize, theta: &[f32], kept: &[bool]) -> (Vec<f32>, Vec<u32>) {
    let size = theta.len();
    let mut h: Vec<Vec<f64>> = h.chunks(block).take(size).map(|row| row[..size].into()).collect();
    let mut theta: Vec<f64> = theta.iter().map(|x| f64::from(*x)).collect();
    let mut left: Vec<usize> = (0..size).filter(|j| kept[*j]).collect();
    let (mut scores, mut turns) = (vec![f32::NEG_INFINITY; size], vec![0; size]);
    let mut highest = 0.0f64;
    while !left.is_empty() {
        let cost = |j: &usize| theta[*j] * theta[*j] / (2.0 * h[*j][*j]);
        let j = *left.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).expect("one is left");
        highest = highest.max(cost(&j));
        (scores[j], turns[j]) = (highest as f32, (size - left.len()) as u32);
        left.retain(|i| *i != j);
        let column = h[j].clone();
        let at = theta[j];
        for i in &left {
            theta[*i] -= column[*i] * at / column[j];
            for k in &left {
                h[*i][*k] -= column[*i] * column[*k] / column[j];
            }
        }
    }
    (scores, turns)
}

#[test]
fn every_instruction_set_takes_the_same_steps() {
    let edges = [1usize, 2, 5, 8, 9, 16, 17, 24, 31, 32, 33, 40, 41, 48, 49, 56, 64, 70, 100, 131];
    for (block, share) in edges.into_iter().flat_map(|block| [(block, 1.0), (block, 0.2)]) {
        // Two blocks side by side, then a short one alone.
        let layout = Layout::new(2 * block + block.div_ceil(3), block).expect("layout");
        let samples = 2 * block + 3;
        let packed = random_statistics(5, layout, samples);
        let weights = random_f32(6, layout.len());
        let kept: Vec<bool> = random(7, layout.len()).iter().map(|x| *x < share).collect();
        let packed = Packed::F64(&packed);
        let statistics = Statistics::new(layout, packed, samples as f64, Some(&kept));
        let damped = statistics.expect("statistics").damped(1e-2).expect("damped");
        let mut full = vec![0.0; layout.dense_len()];
        inverse(damped, &mut full).expect("inverse");
        for isa in Isa::available() {
            let (mut scores, mut turns) = (vec![0.0; layout.len()], vec![0; layout.len()]);
            let report = eliminate_with(isa, damped, &weights, &mut scores, &mut turns);
            assert!(report.expect("report").failed.is_empty());
            for b in 0..layout.blocks() {
                let part = layout.range(b);
                let h = &full[b * block * block..];
                let (want, order) = slow(h, block, &weights[part.clone()], &kept[part.clone()]);
                assert_eq!(turns[part.clone()], order, "{isa:?}, block {b} of {block}");
                for (got, want) in scores[part].iter().zip(&want) {
                    assert!(got == want || (got / want - 1.0).abs() < 1e-5, "{got} {want}");
                }
            }
        }
    }
}

#[test]
fn a_block_does_not_depend_on_its_company() {
    let block = 64;
    for isa in Isa::available() {
        for last in 1..=block {
            // Full blocks before the short one: an even and an odd number of them.
            for full in [1, 2] {
                let layout = Layout::new(full * block + last, block).expect("layout");
                let samples = 40;
                let packed = random_statistics(last as u64, layout, samples);
                let weights = random_f32(6, layout.len());
                let run = |layout: Layout, packed: &[f64], weights: &[f32]| {
                    let packed = Packed::F64(packed);
                    let statistics = Statistics::new(layout, packed, samples as f64, None);
                    let damped = statistics.expect("statistics").damped(1e-8).expect("damped");
                    let (mut scores, mut turns) = (vec![0.0; layout.len()], vec![0; layout.len()]);
                    eliminate_with(isa, damped, weights, &mut scores, &mut turns).expect("report");
                    let bits: Vec<u32> = scores.iter().map(|s| s.to_bits()).collect();
                    (bits, turns)
                };
                let (scores, turns) = run(layout, &packed, &weights);
                for b in 0..layout.blocks() {
                    let part = layout.range(b);
                    let alone = Layout::new(part.len(), block).expect("layout");
                    let own = run(alone, &packed[layout.packed_range(b)], &weights[part.clone()]);
                    assert!(own.0 == scores[part.clone()], "{isa:?}: {last} beside {full}");
                    assert!(own.1 == turns[part], "{isa:?}: {last} beside {full}");
                }
            }
        }
    }
}

#[test]
fn equal_costs_are_removed_in_order() {
    for isa in Isa::available() {
        for block in [1usize, 7, 16, 33, 48, 64, 100, 130, 200] {
            let layout = Layout::new(3 * block, block).expect("layout");
            let packed = vec![0.0f64; layout.packed_len()];
            let statistics = Statistics::new(layout, Packed::F64(&packed), 1.0, None);
            let damped = statistics.expect("statistics").damped(0.5).expect("damped");
            // Also costs that overflow, which are all alike.
            for weight in [0.0f32, 0.25, f32::MAX] {
                let weights = vec![weight; layout.len()];
                let (mut scores, mut turns) = (vec![0.0; layout.len()], vec![0; layout.len()]);
                eliminate_with(isa, damped, &weights, &mut scores, &mut turns).expect("report");
                let order: Vec<u32> = (0..3 * block).map(|j| (j % block) as u32).collect();
                assert_eq!(turns, order, "{isa:?}, blocks of {block}");
                let cost = f64::from(weight) * f64::from(weight) / 4.0;
                assert!(scores.iter().all(|s| *s == cost as f32), "{isa:?}, blocks of {block}");
            }
        }
    }
}
