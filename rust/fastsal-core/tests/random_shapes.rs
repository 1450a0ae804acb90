//! Every function over random shapes, on arrays that end where their data ends: `make asan` looks for
//! reads and writes beyond them. What is computed for a block alone is what is computed in company.
#![allow(clippy::unwrap_used)]

use fastsal_core::accumulate::{accumulate, Sums};
use fastsal_core::compensate::compensate;
use fastsal_core::greedy::eliminate;
use fastsal_core::groups::Groups;
use fastsal_core::patterns::{group_costs, n_of_m};
use fastsal_core::statistics::{Damped, Packed, Statistics};
use fastsal_core::{dual, inverse, select, AnyRows, Isa, Layout, Rows};
use half::{bf16, f16};
use proptest::prelude::*;

/// Numbers in -0.5..0.5 from a linear congruence.
fn numbers(seed: u32, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

/// Sums of both precisions over rows of one element type.
fn sums_of(isa: Isa, layout: Layout, rows: AnyRows<'_>) -> (Vec<f32>, Vec<f64>) {
    let (mut single, mut sums) = (vec![f32::NAN; layout.packed_len()], vec![0.0; layout.len()]);
    let to = Sums::F32 { packed: &mut single, sums: &mut sums };
    accumulate(isa, layout, rows, to, true).unwrap();
    let (mut double, mut sums) = (vec![f64::NAN; layout.packed_len()], vec![0.0; layout.len()]);
    let to = Sums::F64 { packed: &mut double, sums: &mut sums };
    accumulate(isa, layout, rows, to, true).unwrap();
    (single, double)
}

fn damped<'a>(
    layout: Layout,
    packed: &'a [f64],
    kept: &'a [bool],
    n: usize,
    damping: f64,
) -> Damped<'a> {
    let statistics = Statistics::new(layout, Packed::F64(packed), n as f64, Some(kept));
    statistics.unwrap().damped(damping).unwrap()
}

/// Everything that is computed from damped statistics, as bits.
fn computed(damped: Damped<'_>, weights: &[f32], mask: &[bool]) -> [Vec<u64>; 4] {
    let layout = damped.layout();
    let (mut scores, mut turns) = (vec![0.0; weights.len()], vec![0; weights.len()]);
    eliminate(damped, weights, &mut scores, &mut turns).unwrap();
    let mut diagonal = vec![0.0; layout.len()];
    inverse::inverse_diagonal(damped, &mut diagonal).unwrap();
    let mut full = vec![0.0; layout.dense_len()];
    inverse::inverse(damped, &mut full).unwrap();
    let trace: Vec<u64> = (0..layout.len())
        .map(|i| (i / layout.block(), i % layout.block()))
        .map(|(b, i)| full[(b * layout.block() + i) * layout.block() + i].to_bits())
        .collect();
    let mut moved = weights.to_vec();
    compensate(damped, &mut moved, mask).unwrap();
    let bits = |x: &[f32]| x.iter().map(|x| u64::from(x.to_bits())).collect();
    [bits(&scores), bits(&moved), trace, diagonal.iter().map(|x| x.to_bits()).collect()]
}

#[derive(Debug, Clone)]
struct Shape {
    block: usize,
    /// Whole blocks, and the weights of a short one after them.
    full: usize,
    last: usize,
    n: usize,
    /// Elements between two rows.
    gap: usize,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let sizes = prop_oneof![4 => 1usize..=70, 1 => 71usize..=150];
    (sizes, 0usize..=3, 0.0f64..1.0, 1usize..=150, 0usize..=3).prop_map(
        |(block, full, share, n, gap)| {
            let last = (share * block as f64) as usize;
            Shape { block, full, last: if full == 0 { last.max(1) } else { last }, n, gap }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sums_of_every_type_are_near(shape in shapes(), seed in any::<u32>()) {
        let Shape { block, full, last, n, gap } = shape;
        let d = full * block + last;
        let (layout, stride) = (Layout::new(d, block).unwrap(), d + gap);
        let data = numbers(seed, (n - 1) * stride + d);
        let double: Vec<f64> = data.iter().map(|x| f64::from(*x)).collect();
        let half: Vec<f16> = data.iter().map(|x| f16::from_f32(*x)).collect();
        let brain: Vec<bf16> = data.iter().map(|x| bf16::from_f32(*x)).collect();
        for isa in Isa::available() {
            let (_, exact) = sums_of(isa, layout, Rows::new(&double, n, d, stride).unwrap().into());
            for (rows, tolerance) in [
                (AnyRows::from(Rows::new(&data, n, d, stride).unwrap()), 1e-5),
                (Rows::new(&half, n, d, stride).unwrap().into(), 1e-3),
                (Rows::new(&brain, n, d, stride).unwrap().into(), 1e-2),
            ] {
                let (single, sums) = sums_of(isa, layout, rows);
                for ((x, y), z) in single.iter().zip(&sums).zip(&exact) {
                    let error = (f64::from(*x) - z).abs().max((y - z).abs());
                    prop_assert!(error <= tolerance * n as f64, "{isa:?} {x} {y} {z}");
                }
            }
        }
    }

    #[test]
    fn blocks_do_not_depend_on_their_company(
        shape in shapes(), seed in any::<u32>(), damping in prop::sample::select(vec![1e-8, 1e-2]),
        share in -0.6f32..0.6,
    ) {
        let Shape { block, full, last, n, .. } = shape;
        let d = full * block + last;
        let layout = Layout::new(d, block).unwrap();
        let rows = numbers(seed, n * d);
        let rows = Rows::new(&rows, n, d, d).unwrap().into();
        let (_, packed) = sums_of(Isa::chosen().unwrap(), layout, rows);
        let weights = numbers(seed ^ 1, d);
        let kept: Vec<bool> = numbers(seed ^ 2, d).iter().map(|x| *x > share).collect();
        let mask: Vec<bool> = numbers(seed ^ 3, d).iter().map(|x| *x > 0.0).collect();
        let all = computed(damped(layout, &packed, &kept, n, damping), &weights, &mask);
        for b in 0..layout.blocks() {
            let part = layout.range(b);
            let alone = Layout::new(part.len(), block).unwrap();
            // Copies end with the block.
            let (own, kept) = (packed[layout.packed_range(b)].to_vec(), kept[part.clone()].to_vec());
            let (weights, mask) = (&weights[part.clone()], &mask[part.clone()]);
            let found = computed(damped(alone, &own, &kept, n, damping), weights, mask);
            for (found, all) in found.iter().zip(&all) {
                prop_assert!(found[..] == all[part.clone()], "block {b}");
            }
        }
    }

    #[test]
    fn patterns_and_thresholds_keep_their_counts(
        outer in 1usize..5, width in 1usize..20, inner in 1usize..4, block in 1usize..70,
        m in 1usize..=8, keep in 1usize..=8, n in 1usize..60, seed in any::<u32>(),
    ) {
        let (d, keep) = (outer * width * inner, keep.min(m));
        let layout = Layout::new(d, block).unwrap();
        let rows = numbers(seed, n * d);
        let rows: AnyRows<'_> = Rows::new(&rows, n, d, d).unwrap().into();
        let (single, _) = sums_of(Isa::chosen().unwrap(), layout, rows);
        let statistics = Statistics::new(layout, Packed::F32(&single), n as f64, None).unwrap();
        let damped = statistics.damped(1e-2).unwrap();
        let (mut blocks, mut diagonal) = (vec![0.0; layout.dense_len()], vec![0.0; d]);
        statistics.blocks(&mut blocks).unwrap();
        statistics.diagonal(&mut diagonal).unwrap();
        for (i, x) in diagonal.iter().enumerate() {
            let (b, i) = (i / layout.block(), i % layout.block());
            prop_assert_eq!(blocks[(b * layout.block() + i) * layout.block() + i], *x);
        }
        let weights = numbers(seed ^ 1, d);
        let groups = Groups::new((outer, width, inner), m).unwrap();
        let (mut kept, mut plain) = (vec![false; d], vec![false; d]);
        n_of_m(damped, &weights, groups, keep, &mut kept).unwrap();
        select::n_of_m(&weights, (outer, width, inner), keep, m, &mut plain).unwrap();
        let count = |mask: &[bool]| mask.iter().filter(|k| **k).count();
        let each = (0..width).step_by(m).map(|w| (m.min(width - w) * keep).div_ceil(m));
        prop_assert_eq!(count(&kept), each.sum::<usize>() * outer * inner);
        prop_assert_eq!(count(&kept), count(&plain));
        let mut costs = vec![0.0; d];
        group_costs(damped, &weights, groups, &mut costs).unwrap();
        prop_assert!(costs.iter().all(|c| *c >= 0.0));
        let (cuts, _) = select::smallest(&[&costs], d / 2, &[]).unwrap();
        select::write_mask(&costs, cuts[0], &mut kept).unwrap();
        prop_assert_eq!(count(&kept), d - d / 2);
        let mut inverses = vec![0.0; d];
        dual::inverse_diagonal(layout, rows, n as f64, Some(&plain), 1e-2, &mut inverses).unwrap();
        prop_assert!(inverses.iter().all(|x| *x > 0.0));
    }
}
