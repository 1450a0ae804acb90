//! Shared by the tests: numbers, and statistics made from them.

use crate::accumulate::{accumulate, Sums};
use crate::{Isa, Layout, Rows};

/// Numbers in (-1, 1) from a small generator (Knuth's MMIX), the same on every machine.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The same in single precision.
pub(crate) fn random_f32(seed: u64, len: usize) -> Vec<f32> {
    random(seed, len).into_iter().map(|x| x as f32).collect()
}

/// Packed statistics of `n` random gradients.
pub(crate) fn random_statistics(seed: u64, layout: Layout, n: usize) -> Vec<f64> {
    let (data, d) = (random(seed, n * layout.len()), layout.len());
    let (mut packed, mut sums) = (vec![0.0; layout.packed_len()], vec![0.0; d]);
    let rows = Rows::new(&data, n, d, d).expect("rows").into();
    let to = Sums::F64 { packed: &mut packed, sums: &mut sums };
    accumulate(Isa::best(), layout, rows, to, true).expect("accumulate");
    packed
}

/// Largest difference over the largest expected number.
pub(crate) fn relative_error<T: Copy + Into<f64>>(got: &[T], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let difference = |(g, e): (&T, &f64)| ((*g).into() - e).abs();
    got.iter().zip(expected).map(difference).fold(0.0, f64::max) / scale
}
