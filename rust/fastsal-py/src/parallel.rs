//! Calls of the core without the GIL, threads, and the build.

use std::cell::RefCell;

use fastsal_core::{parallel, Isa, Result};
use pyo3::prelude::*;

use crate::errors::to_python;

thread_local! {
    /// What a signal handler raised during the call of this thread.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Run the handlers of signals that have arrived; return whether one of them raised.
fn signals() -> bool {
    // Without an interpreter there is nobody to wait for the result.
    let raised = Python::try_attach(|py| py.check_signals().map_err(|e| RAISED.set(Some(e))));
    raised != Some(Ok(()))
}

/// Call the core without the GIL; signals are handled meanwhile, and what a handler raises ends the
/// call.
///
/// `work` is about how many nanoseconds the call takes on one processor.
pub fn call<R: Send>(
    py: Python<'_>,
    work: u64,
    job: impl FnOnce() -> Result<R> + Send,
) -> PyResult<R> {
    let result = py.detach(|| parallel::call(work, signals, job));
    match RAISED.take() {
        Some(error) => Err(error),
        None => result.map_err(to_python),
    }
}

/// Call the core without the GIL, to the end: for what is changed in place.
pub fn call_to_the_end<R: Send>(
    py: Python<'_>,
    work: u64,
    job: impl FnOnce() -> Result<R> + Send,
) -> PyResult<R> {
    py.detach(|| parallel::call(work, parallel::never, job)).map_err(to_python)
}

/// Number of worker threads.
#[pyfunction]
pub fn num_threads() -> usize {
    parallel::threads()
}

/// Use `n` worker threads from the next call on; zero means as many as the environment says.
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
