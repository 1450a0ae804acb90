//! Greedy elimination.

use fastsal_core::memory::zeros;
use fastsal_core::statistics::Report;
use fastsal_core::{greedy, parallel, Result};
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arrays::{check_count, cubes, slice, statistics, to_numpy, Array, Parameter};
use crate::parallel::call;

/// Scores, turns, failed blocks, sensitivity of each block.
type Elimination<'py> =
    (Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<u32>>, Vec<usize>, Bound<'py, PyArray1<f64>>);

/// Greedy elimination of all parameters: scores `[d]`, turns `[d]`, failed blocks and sensitivity.
#[pyfunction]
pub fn eliminate<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    weights: Vec<Array<'py, f32>>,
    block_size: usize,
    damping: f64,
) -> PyResult<Vec<Elimination<'py>>> {
    check_count("weights", weights.len(), parameters.len())?;
    let borrowed = parameters
        .iter()
        .zip(&weights)
        .map(|(p, w)| Ok((statistics(p, block_size)?, slice("weights", w)?)))
        .collect::<PyResult<Vec<_>>>()?;
    let results = call(py, cubes(&parameters, block_size), || {
        parallel::map(borrowed, |(statistics, weights)| {
            let mut scores = zeros("scores", weights.len())?;
            let mut turns = zeros("turns", weights.len())?;
            let damped = statistics.damped(damping)?;
            let report = greedy::eliminate(damped, weights, &mut scores, &mut turns)?;
            Ok((scores, turns, report))
        })
        .into_iter()
        .collect::<Result<Vec<_>>>()
    })?;
    let wrap = |(scores, turns, report): (Vec<f32>, Vec<u32>, Report)| {
        let sensitivity = to_numpy(py, report.sensitivity);
        (to_numpy(py, scores), to_numpy(py, turns), report.failed, sensitivity)
    };
    Ok(results.into_iter().map(wrap).collect())
}
