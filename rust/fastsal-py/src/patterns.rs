//! Groups of weights by their joint cost.

use fastsal_core::groups::Groups;
use fastsal_core::memory::zeros;
use fastsal_core::statistics::Damped;
use fastsal_core::{parallel, patterns, Result};
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arrays::{check_count, cubes, slice, statistics, to_numpy, Array, Parameter};
use crate::parallel::call;

/// `[outer, width, inner]` around the axis that is cut.
type Shape = (usize, usize, usize);
/// An array of a parameter, and the blocks that failed.
type Found<'py, T> = (Bound<'py, PyArray1<T>>, Vec<usize>);

/// Keep `n` of every `m` along the middle axis by joint cost: masks and failed blocks.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // the keyword arguments of the core
pub fn n_of_m_joint<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    weights: Vec<Array<'py, f32>>,
    shapes: Vec<Shape>,
    block_size: usize,
    n: usize,
    m: usize,
    damping: f64,
) -> PyResult<Vec<Found<'py, bool>>> {
    let results = each(
        py,
        &parameters,
        &weights,
        shapes,
        block_size,
        m,
        damping,
        |damped, weights, groups| {
            let mut kept = zeros("masks", weights.len())?;
            patterns::n_of_m(damped, weights, groups, n, &mut kept).map(|failed| (kept, failed))
        },
    )?;
    Ok(results.into_iter().map(|(kept, failed)| (to_numpy(py, kept), failed)).collect())
}

/// The joint cost of every group of `m`, at each of its members: costs and failed blocks.
#[pyfunction]
pub fn group_costs<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    weights: Vec<Array<'py, f32>>,
    shapes: Vec<Shape>,
    block_size: usize,
    m: usize,
    damping: f64,
) -> PyResult<Vec<Found<'py, f32>>> {
    let results = each(
        py,
        &parameters,
        &weights,
        shapes,
        block_size,
        m,
        damping,
        |damped, weights, groups| {
            let mut costs = zeros("costs", weights.len())?;
            patterns::group_costs(damped, weights, groups, &mut costs).map(|failed| (costs, failed))
        },
    )?;
    Ok(results.into_iter().map(|(costs, failed)| (to_numpy(py, costs), failed)).collect())
}

#[allow(clippy::too_many_arguments)] // those of its callers
fn each<R: Send>(
    py: Python<'_>,
    parameters: &[Parameter<'_>],
    weights: &[Array<'_, f32>],
    shapes: Vec<Shape>,
    block_size: usize,
    size: usize,
    damping: f64,
    job: impl Fn(Damped<'_>, &[f32], Groups) -> Result<R> + Sync + Send,
) -> PyResult<Vec<R>> {
    check_count("weights", weights.len(), parameters.len())?;
    check_count("shapes", shapes.len(), parameters.len())?;
    let borrowed = parameters
        .iter()
        .zip(weights)
        .zip(shapes)
        .map(|((p, w), shape)| Ok((statistics(p, block_size)?, slice("weights", w)?, shape)))
        .collect::<PyResult<Vec<_>>>()?;
    call(py, cubes(parameters, block_size), || {
        parallel::map(borrowed, |(statistics, weights, shape)| {
            job(statistics.damped(damping)?, weights, Groups::new(shape, size)?)
        })
        .into_iter()
        .collect()
    })
}
