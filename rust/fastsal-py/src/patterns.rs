//! Groups of weights by their joint cost.

use fastsal_core::patterns::{self, Groups};
use fastsal_core::{parallel, Error};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::arrays::{slice, to_numpy};
use crate::errors::to_python;
use crate::factor::{borrow, with_statistics, Either, Parameter};

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
    weights: Vec<PyReadonlyArray1<'py, f32>>,
    shapes: Vec<Shape>,
    block_size: usize,
    n: usize,
    m: usize,
    damping: f64,
) -> PyResult<Vec<Found<'py, bool>>> {
    let results = each(py, &parameters, &weights, shapes, block_size, m, |s, weights, groups| {
        let mut kept = vec![false; weights.len()];
        with_statistics!(s, s => patterns::n_of_m(s, weights, groups, n, damping, &mut kept))
            .map(|failed| (kept, failed))
    })?;
    Ok(results.into_iter().map(|(kept, failed)| (to_numpy(py, kept), failed)).collect())
}

/// The joint cost of every group of `m`, at each of its members: costs and failed blocks.
#[pyfunction]
pub fn group_costs<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    weights: Vec<PyReadonlyArray1<'py, f32>>,
    shapes: Vec<Shape>,
    block_size: usize,
    m: usize,
    damping: f64,
) -> PyResult<Vec<Found<'py, f32>>> {
    let results = each(py, &parameters, &weights, shapes, block_size, m, |s, weights, groups| {
        let mut costs = vec![0.0; weights.len()];
        with_statistics!(s, s => patterns::group_costs(s, weights, groups, damping, &mut costs))
            .map(|failed| (costs, failed))
    })?;
    Ok(results.into_iter().map(|(costs, failed)| (to_numpy(py, costs), failed)).collect())
}

fn each<R: Send>(
    py: Python<'_>,
    parameters: &[Parameter<'_>],
    weights: &[PyReadonlyArray1<'_, f32>],
    shapes: Vec<Shape>,
    block_size: usize,
    size: usize,
    job: impl Fn(Either<'_>, &[f32], Groups) -> Result<R, Error> + Sync + Send,
) -> PyResult<Vec<R>> {
    let borrowed = parameters
        .iter()
        .zip(weights)
        .zip(shapes)
        .map(|((p, w), shape)| Ok((borrow(p, block_size)?, slice("weights", w)?, shape)))
        .collect::<PyResult<Vec<_>>>()?;
    let results = py.detach(|| {
        parallel::map(borrowed, |(statistics, weights, (outer, width, inner))| {
            job(statistics, weights, Groups { outer, width, inner, size })
        })
    });
    results.into_iter().map(|r| r.map_err(to_python)).collect()
}
