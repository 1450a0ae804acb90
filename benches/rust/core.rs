//! Time the core alone: `cargo bench -p fastsal-core`. `fastsal bench` compares it with its peers.

#![allow(clippy::expect_used)]

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use fastsal_core::accumulate::{accumulate, Sums};
use fastsal_core::greedy::eliminate;
use fastsal_core::inverse::inverse_diagonal;
use fastsal_core::select::smallest;
use fastsal_core::statistics::{Packed, Statistics};
use fastsal_core::{Isa, Layout, Rows};

/// Numbers in -0.5..0.5 from a linear congruence.
fn numbers(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

fn statistics(layout: Layout, n: usize) -> Vec<f32> {
    let d = layout.len();
    let data = numbers(n * d);
    let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; d]);
    let rows = Rows::new(&data, n, d, d).expect("rows").into();
    let to = Sums::F32 { packed: &mut packed, sums: &mut sums };
    accumulate(Isa::best(), layout, rows, to, true).expect("statistics");
    packed
}

fn gram(c: &mut Criterion) {
    let mut group = c.benchmark_group("gram");
    let d = 1 << 18;
    for (isa, block, n) in Isa::available()
        .into_iter()
        .flat_map(|isa| [(64, 8), (64, 64), (128, 64)].map(|(block, n)| (isa, block, n)))
    {
        let layout = Layout::new(d, block).expect("layout");
        let data = numbers(n * d);
        let rows = Rows::new(&data, n, d, d).expect("rows").into();
        let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; d]);
        // A product and a sum for each entry of the triangles.
        group.throughput(Throughput::Elements((n * d * (block + 1)) as u64));
        let id = BenchmarkId::new(isa.name(), format!("B={block} n={n}"));
        group.bench_function(id, |b| {
            b.iter(|| {
                let to = Sums::F32 { packed: &mut packed, sums: &mut sums };
                accumulate(isa, layout, rows, to, false)
            });
        });
    }
}

fn blocks(c: &mut Criterion) {
    let mut group = c.benchmark_group("blocks");
    let d = 1 << 18;
    for block in [32, 64, 128, 256] {
        let layout = Layout::new(d, block).expect("layout");
        let packed = statistics(layout, 64);
        let weights = numbers(d);
        let statistics = Statistics::new(layout, Packed::F32(&packed), 64.0, None);
        let damped = statistics.and_then(|s| s.damped(1e-3)).expect("statistics");
        group.throughput(Throughput::Elements(d as u64));
        let mut diagonal = vec![0.0; d];
        group.bench_function(BenchmarkId::new("inverse diagonal", block), |b| {
            b.iter(|| inverse_diagonal(damped, &mut diagonal));
        });
        let (mut scores, mut turns) = (vec![0.0; d], vec![0; d]);
        group.bench_function(BenchmarkId::new("greedy elimination", block), |b| {
            b.iter(|| eliminate(damped, &weights, &mut scores, &mut turns));
        });
    }
}

fn threshold(c: &mut Criterion) {
    let scores: Vec<f32> = numbers(1 << 24).into_iter().map(f32::abs).collect();
    let mut group = c.benchmark_group("threshold");
    group.throughput(Throughput::Bytes(4 * scores.len() as u64));
    group.bench_function("90 %", |b| b.iter(|| smallest(&[&scores], scores.len() / 10 * 9, &[])));
}

criterion_group!(benches, gram, blocks, threshold);
criterion_main!(benches);
