//! Greedy elimination.

use fastsal_core::{eliminate as core, parallel};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::arrays::{slice, to_numpy};
use crate::errors::to_python;
use crate::factor::{borrow, with_statistics, Parameter};

/// Scores, turns, failed blocks.
type Elimination<'py> = (Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<u32>>, Vec<usize>);

/// Greedy elimination of all parameters: scores `[d]`, turns `[d]` and failed blocks of each.
#[pyfunction]
pub fn eliminate<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    weights: Vec<PyReadonlyArray1<'py, f32>>,
    block_size: usize,
    damping: f64,
) -> PyResult<Vec<Elimination<'py>>> {
    let borrowed = parameters
        .iter()
        .zip(&weights)
        .map(|(p, w)| Ok((borrow(p, block_size)?, slice("weights", w)?)))
        .collect::<PyResult<Vec<_>>>()?;
    let results = py.detach(|| {
        parallel::map(borrowed, |(statistics, weights)| {
            let (mut scores, mut turns) = (vec![0.0; weights.len()], vec![0; weights.len()]);
            with_statistics!(statistics, s => {
                core::eliminate(s, weights, damping, &mut scores, &mut turns)
            })
            .map(|failed| (scores, turns, failed))
        })
    });
    let wrap = |(scores, turns, failed)| (to_numpy(py, scores), to_numpy(py, turns), failed);
    results.into_iter().map(|r| r.map(wrap).map_err(to_python)).collect()
}
