//! Blocks, damped blocks, and their inverses.

use fastsal_core::memory::zeros;
use fastsal_core::statistics::{Damped, Report, Statistics};
use fastsal_core::{inverse as core, parallel, Result};
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arrays::{cubes, statistics, to_numpy, Parameter};
use crate::parallel::call;

/// Values, failed blocks, sensitivity of each block.
pub type Inverse<'py> = (Bound<'py, PyArray1<f64>>, Vec<usize>, Bound<'py, PyArray1<f64>>);

/// `diag(A⁻¹)` of all parameters, each `[d]`.
#[pyfunction]
pub fn inverse_diagonal<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    block_size: usize,
    damping: f64,
) -> PyResult<Vec<Inverse<'py>>> {
    invert(py, &parameters, block_size, damping, |damped| {
        let mut out = zeros("the diagonals", damped.layout().len())?;
        core::inverse_diagonal(damped, &mut out).map(|report| (out, report))
    })
}

/// `A⁻¹` of all parameters, each `[blocks * B * B]`.
#[pyfunction]
pub fn inverse<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    block_size: usize,
    damping: f64,
) -> PyResult<Vec<Inverse<'py>>> {
    invert(py, &parameters, block_size, damping, |damped| {
        let mut out = zeros("the inverses", damped.layout().dense_len())?;
        core::inverse(damped, &mut out).map(|report| (out, report))
    })
}

fn invert<'py>(
    py: Python<'py>,
    parameters: &[Parameter<'py>],
    block_size: usize,
    damping: f64,
    job: impl Fn(Damped<'_>) -> Result<(Vec<f64>, Report)> + Sync + Send,
) -> PyResult<Vec<Inverse<'py>>> {
    let borrowed =
        parameters.iter().map(|p| statistics(p, block_size)).collect::<PyResult<Vec<_>>>()?;
    let results = call(py, cubes(parameters, block_size), || {
        let invert = |s: Statistics<'_>| s.damped(damping).and_then(&job);
        parallel::map(borrowed, invert).into_iter().collect::<Result<Vec<_>>>()
    })?;
    let wrap = |(out, report): (Vec<f64>, Report)| {
        (to_numpy(py, out), report.failed, to_numpy(py, report.sensitivity))
    };
    Ok(results.into_iter().map(wrap).collect())
}

/// `F_b` of one parameter, `[blocks * B * B]`, a short last block padded with zeros.
#[pyfunction]
pub fn blocks<'py>(
    py: Python<'py>,
    parameter: Parameter<'py>,
    block_size: usize,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let statistics = statistics(&parameter, block_size)?;
    let out = call(py, statistics.layout().dense_len() as u64, || {
        let mut out = zeros("the blocks", statistics.layout().dense_len())?;
        statistics.blocks(&mut out).map(|()| out)
    });
    out.map(|out| to_numpy(py, out))
}

/// `diag(F)` of one parameter, `[d]`.
#[pyfunction]
pub fn diagonal<'py>(
    py: Python<'py>,
    parameter: Parameter<'py>,
    block_size: usize,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let statistics = statistics(&parameter, block_size)?;
    // Each of the sums that are read is on a cache line of its own.
    let out = call(py, 4 * statistics.layout().len() as u64, || {
        let mut out = zeros("the diagonal", statistics.layout().len())?;
        statistics.diagonal(&mut out).map(|()| out)
    });
    out.map(|out| to_numpy(py, out))
}
