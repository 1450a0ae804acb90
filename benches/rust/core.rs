//! The core alone: `cargo bench -p fastsal-core`. Peers stand in `fastsal bench`.

#![allow(clippy::expect_used)]

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use fastsal_core::factor::{inverse_diagonal, Statistics};
use fastsal_core::gram::accumulate_with;
use fastsal_core::{eliminate::eliminate, select::smallest, Isa, Layout, Rows};

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
    let data = numbers(n * layout.len);
    let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; layout.len]);
    let rows = Rows::new(&data, n, layout.len, layout.len).expect("rows");
    accumulate_with(Isa::best(), layout, rows, &mut packed, &mut sums, true).expect("statistics");
    packed
}

fn gram(c: &mut Criterion) {
    let mut group = c.benchmark_group("gram");
    let d = 1 << 18;
    for (isa, block, n) in Isa::available()
        .into_iter()
        .flat_map(|isa| [(64, 8), (64, 64), (128, 64)].map(|(block, n)| (isa, block, n)))
    {
        let layout = Layout::new(d, block);
        let data = numbers(n * d);
        let rows = Rows::new(&data, n, d, d).expect("rows");
        let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; d]);
        // A product and a sum for each entry of the triangles.
        group.throughput(Throughput::Elements((n * d * (block + 1)) as u64));
        let id = BenchmarkId::new(isa.name(), format!("B={block} n={n}"));
        group.bench_function(id, |b| {
            b.iter(|| accumulate_with(isa, layout, rows, &mut packed, &mut sums, false));
        });
    }
}

fn blocks(c: &mut Criterion) {
    let mut group = c.benchmark_group("blocks");
    let d = 1 << 18;
    for block in [32, 64, 128, 256] {
        let layout = Layout::new(d, block);
        let packed = statistics(layout, 64);
        let weights = numbers(d);
        let statistics = Statistics { layout, packed: &packed, samples: 64.0, kept: None };
        group.throughput(Throughput::Elements(d as u64));
        let mut diagonal = vec![0.0; d];
        group.bench_function(BenchmarkId::new("inverse diagonal", block), |b| {
            b.iter(|| inverse_diagonal(statistics, 1e-3, &mut diagonal));
        });
        let (mut scores, mut turns) = (vec![0.0; d], vec![0; d]);
        group.bench_function(BenchmarkId::new("greedy elimination", block), |b| {
            b.iter(|| eliminate(statistics, &weights, 1e-3, &mut scores, &mut turns));
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
