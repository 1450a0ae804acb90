//! The core of fastsal: block-diagonal empirical Fisher statistics of large models on CPUs.
//!
//! Plain arrays in, plain arrays out; this crate knows no Python. Letters as in the design:
//! `d` weights of a parameter, blocks of `B`, `N` samples, `F_b = (1/N) sum_n g_nb g_nbᵀ`,
//! damping `λ`, `A_b = F_b + λ I`.
#![cfg_attr(test, allow(clippy::expect_used, clippy::panic, clippy::unwrap_used))]

pub mod compensate;
mod dense;
pub mod dual;
pub mod eliminate;
pub mod error;
pub mod exchange;
pub mod factor;
pub mod gram;
pub mod layout;
pub mod parallel;
pub mod patterns;
pub mod rows;
pub mod select;
mod simd;
mod small;
mod tiles;

pub use error::{Error, Result};
pub use layout::Layout;
pub use rows::{Element, Rows};
pub use simd::{Isa, Real};

#[cfg(test)]
pub(crate) mod tests {
    use crate::Real;

    /// Numbers in (-1, 1) from a small generator (Knuth's MMIX), the same on every machine.
    pub(crate) fn random(seed: u64, len: usize) -> Vec<f64> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Largest difference over the largest expected number.
    pub(crate) fn relative_error<T: Real>(got: &[T], expected: &[f64]) -> f64 {
        assert_eq!(got.len(), expected.len());
        let scale = expected.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        let difference = |(g, e): (&T, &f64)| ((*g).into() - e).abs();
        got.iter().zip(expected).map(difference).fold(0.0, f64::max) / scale
    }
}
