use super::*;
use crate::statistics::{Packed, Statistics};
use crate::testing::{random, random_f32, random_statistics};
use crate::Layout;

#[test]
fn the_gradient_of_the_kept_weights_is_zero() {
    for (len, block, share) in [(70, 64, 0.0), (200, 64, -0.8), (37, 9, 0.5), (300, 130, 0.2)] {
        let layout = Layout::new(len, block).expect("layout");
        let samples = 2 * block;
        let packed = random_statistics(7, layout, samples);
        let there: Vec<bool> = (0..len).map(|i| i % 7 != 3).collect();
        let statistics =
            Statistics::new(layout, Packed::F64(&packed), samples as f64, Some(&there))
                .expect("statistics");
        let damped = statistics.damped(1e-2).expect("damped");
        let mut dense = vec![0.0; layout.dense_len()];
        statistics.blocks(&mut dense).expect("blocks");
        let before = random_f32(6, len);
        let mask: Vec<bool> = random(8, len).iter().map(|x| *x < share).collect();
        let mut after = before.clone();
        let found = compensate(damped, &mut after, &mask).expect("compensate");
        assert!(found.failed.is_empty());
        for b in 0..layout.blocks() {
            let (part, mut increase) = (layout.range(b), 0.0);
            // The step of the weights that were there; those before it are what is left of others.
            let step = |j: usize| {
                if there[j] {
                    f64::from(after[j]) - f64::from(before[j])
                } else {
                    0.0
                }
            };
            for i in part.clone().filter(|i| there[*i]) {
                let entry = |j: usize| {
                    let damping = if i == j { 1e-2 } else { 0.0 };
                    dense[(b * block + i % block) * block + j % block] + damping
                };
                let slope: f64 = part.clone().map(|j| entry(j) * step(j)).sum();
                increase += slope * step(i) / 2.0;
                if mask[i] {
                    assert!(slope.abs() < 1e-6, "{i} of blocks of {block}: {slope}");
                } else {
                    assert_eq!(after[i], 0.0);
                }
            }
            assert!((found.increase[b] - increase).abs() < 1e-6 * found.uncompensated[b].max(1e-3));
        }
    }
}

#[test]
fn a_block_of_which_nothing_is_pruned_is_not_factored() {
    let layout = Layout::new(24, 8).expect("layout");
    let mut packed = vec![0.0f64; layout.packed_len()];
    for b in [0, 2] {
        packed[layout.packed_range(b).start] = -9.0;
    }
    let there: Vec<bool> = (0..24).map(|i| i != 1).collect();
    let statistics = Statistics::new(layout, Packed::F64(&packed), 1.0, Some(&there));
    let damped = statistics.expect("statistics").damped(1.0).expect("damped");
    let mut weights = random_f32(3, 24);
    let before = weights.clone();
    // Of the first block only a weight that was pruned before, of the second all.
    let mask: Vec<bool> = (0..24).map(|i| i > 15 && i != 20 || i < 8 && i != 1).collect();
    let found = compensate(damped, &mut weights, &mask).expect("compensate");
    assert_eq!(found.failed, [2]);
    assert_eq!((found.increase[0], found.uncompensated[0]), (0.0, 0.0));
    assert!((found.increase[1] / found.uncompensated[1] - 1.0).abs() < 1e-12);
    for (j, (weight, before)) in weights.iter().zip(&before).enumerate() {
        assert_eq!(*weight, if mask[j] { *before } else { 0.0 });
    }
}
