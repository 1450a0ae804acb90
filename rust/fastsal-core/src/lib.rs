//! The core of fastsal: block-diagonal empirical Fisher statistics of large models on CPUs.
//!
//! Plain arrays in, plain arrays out; this crate knows no Python. Letters as in the design:
//! `d` weights of a parameter, blocks of `B`, `N` samples, `F_b = (1/N) sum_n g_nb g_nbᵀ`,
//! damping `λ`, `A_b = F_b + λ I`.
//!
//! No function of the interface is generic: kernels are compiled here, once for each instruction
//! set, and never into a caller.
#![cfg_attr(test, allow(clippy::expect_used, clippy::panic, clippy::unwrap_used))]

pub mod accumulate;
mod cholesky;
pub mod compensate;
pub mod dual;
pub mod error;
pub mod exchange;
pub mod finite;
mod floats;
pub mod greedy;
mod greedy_large;
mod greedy_state;
mod group_costs;
pub mod groups;
mod interleaved;
pub mod inverse;
pub mod isa;
pub mod keys;
pub mod layout;
pub mod memory;
mod panels;
pub mod parallel;
pub mod patterns;
pub mod rows;
mod scratch;
pub mod select;
mod simd;
pub mod statistics;
mod swept;
mod syrk;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
pub use isa::Isa;
pub use layout::Layout;
pub use rows::{AnyRows, Element, Rows};
