//! Threads and the build.

use fastsal_core::{parallel, Isa};
use pyo3::prelude::*;

/// Number of worker threads.
#[pyfunction]
pub fn num_threads() -> usize {
    parallel::threads()
}

/// Use `n` worker threads from the next call on; zero means every processor available.
#[pyfunction]
pub fn set_num_threads(n: usize) {
    parallel::set_threads(n);
}

/// Version, instruction set and whether the build is optimized.
#[pyfunction]
pub fn build_info() -> (&'static str, &'static str, bool) {
    (env!("CARGO_PKG_VERSION"), Isa::best().name(), !cfg!(debug_assertions))
}
