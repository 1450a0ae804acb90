//! Threads and the build.

use fastsal_core::{parallel, Isa};
use pyo3::prelude::*;

use crate::errors::to_python;

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

/// Version, instruction set in use and whether the build is optimized.
#[pyfunction]
pub fn build_info() -> PyResult<(&'static str, &'static str, bool)> {
    let isa = Isa::chosen().map_err(to_python)?;
    Ok((env!("CARGO_PKG_VERSION"), isa.name(), !cfg!(debug_assertions)))
}
