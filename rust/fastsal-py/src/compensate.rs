//! Joint compensation.

use fastsal_core::memory::zeros;
use fastsal_core::{compensate as core, parallel, Result};
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arrays::{check_count, cubes, slice, statistics, to_numpy, Array, Mask, Parameter};
use crate::parallel::call;

/// New weights, predicted increase of each block, the same uncompensated, failed blocks.
type Compensation<'py> =
    (Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<f64>>, Vec<usize>);

/// Joint compensation of all parameters.
#[pyfunction]
pub fn compensate<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    weights: Vec<Array<'py, f32>>,
    masks: Vec<Mask>,
    block_size: usize,
    damping: f64,
) -> PyResult<Vec<Compensation<'py>>> {
    check_count("weights", weights.len(), parameters.len())?;
    check_count("masks", masks.len(), parameters.len())?;
    let borrowed = parameters
        .iter()
        .zip(&weights)
        .zip(&masks)
        .map(|((p, w), m)| Ok((statistics(p, block_size)?, slice("weights", w)?, m.as_slice())))
        .collect::<PyResult<Vec<_>>>()?;
    let results = call(py, cubes(&parameters, block_size), || {
        parallel::map(borrowed, |(statistics, weights, mask)| {
            let mut moved = zeros("weights", weights.len())?;
            moved.copy_from_slice(weights);
            let report = core::compensate(statistics.damped(damping)?, &mut moved, mask)?;
            Ok((moved, report))
        })
        .into_iter()
        .collect::<Result<Vec<_>>>()
    })?;
    let wrap = |(weights, report): (Vec<f32>, core::Compensation)| {
        let (after, before) = (to_numpy(py, report.increase), to_numpy(py, report.uncompensated));
        (to_numpy(py, weights), after, before, report.failed)
    };
    Ok(results.into_iter().map(wrap).collect())
}
