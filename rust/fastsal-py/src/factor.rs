//! Damped blocks and their inverses.

use fastsal_core::factor::{self, Report, Statistics};
use fastsal_core::{parallel, Layout, Real};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::arrays::{optional, slice, to_numpy, Floats};
use crate::errors::to_python;

/// One parameter: (packed sums, d, samples, kept or None).
pub type Parameter<'py> = (Floats<'py>, usize, f64, Option<PyReadonlyArray1<'py, bool>>);
/// Values, failed blocks, sensitivity of each block.
pub type Inverse<'py> = (Bound<'py, PyArray1<f64>>, Vec<usize>, Bound<'py, PyArray1<f64>>);

/// The statistics of one parameter in either precision.
#[derive(Clone, Copy)]
pub enum Either<'a> {
    F32(Statistics<'a, f32>),
    F64(Statistics<'a, f64>),
}

/// Borrow a parameter's statistics.
pub fn borrow<'a>(parameter: &'a Parameter<'_>, block_size: usize) -> PyResult<Either<'a>> {
    fn statistics<'a, T: Real>(
        packed: &'a [T],
        (d, samples, kept): (usize, f64, Option<&'a [bool]>),
        block_size: usize,
    ) -> Statistics<'a, T> {
        Statistics { layout: Layout::new(d, block_size), packed, samples, kept }
    }
    let (packed, d, samples, kept) = parameter;
    let rest = (*d, *samples, optional("kept", kept.as_ref())?);
    Ok(match packed {
        Floats::F32(a) => Either::F32(statistics(slice("packed", a)?, rest, block_size)),
        Floats::F64(a) => Either::F64(statistics(slice("packed", a)?, rest, block_size)),
    })
}

/// Run `$body` with `$statistics` in the precision that came.
macro_rules! with_statistics {
    ($either:expr, $statistics:ident => $body:expr) => {
        match $either {
            $crate::factor::Either::F32($statistics) => $body,
            $crate::factor::Either::F64($statistics) => $body,
        }
    };
}
pub(crate) use with_statistics;

/// `diag(A⁻¹)` of all parameters, each `[d]`.
#[pyfunction]
pub fn inverse_diagonal<'py>(
    py: Python<'py>,
    parameters: Vec<Parameter<'py>>,
    block_size: usize,
    damping: f64,
) -> PyResult<Vec<Inverse<'py>>> {
    invert(py, &parameters, block_size, |statistics| {
        with_statistics!(statistics, s => {
            let mut out = vec![0.0; s.layout.len];
            factor::inverse_diagonal(s, damping, &mut out).map(|report| (out, report))
        })
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
    invert(py, &parameters, block_size, |statistics| {
        with_statistics!(statistics, s => {
            let mut out = vec![0.0; s.layout.blocks() * s.layout.block * s.layout.block];
            factor::inverse(s, damping, &mut out).map(|report| (out, report))
        })
    })
}

fn invert<'py>(
    py: Python<'py>,
    parameters: &[Parameter<'py>],
    block_size: usize,
    job: impl Fn(Either<'_>) -> fastsal_core::Result<(Vec<f64>, Report)> + Sync + Send,
) -> PyResult<Vec<Inverse<'py>>> {
    let borrowed =
        parameters.iter().map(|p| borrow(p, block_size)).collect::<PyResult<Vec<_>>>()?;
    let results = py.detach(|| parallel::map(borrowed, job));
    let wrap = |(out, report): (Vec<f64>, Report)| {
        (to_numpy(py, out), report.failed, to_numpy(py, report.sensitivity))
    };
    results.into_iter().map(|r| r.map(wrap).map_err(to_python)).collect()
}

/// `F_b` of one parameter, `[blocks * B * B]`, a short last block padded with zeros.
#[pyfunction]
pub fn blocks<'py>(
    py: Python<'py>,
    parameter: Parameter<'py>,
    block_size: usize,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let out = with_statistics!(borrow(&parameter, block_size)?, s => py.detach(|| {
        let mut out = vec![0.0; s.layout.blocks() * s.layout.block * s.layout.block];
        factor::blocks(s, &mut out).map(|()| out)
    }));
    out.map(|out| to_numpy(py, out)).map_err(to_python)
}

/// `diag(F)` of one parameter, `[d]`.
#[pyfunction]
pub fn diagonal<'py>(
    py: Python<'py>,
    parameter: Parameter<'py>,
    block_size: usize,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let out = with_statistics!(borrow(&parameter, block_size)?, s => py.detach(|| {
        let mut out = vec![0.0; s.layout.len];
        factor::diagonal(s, &mut out).map(|()| out)
    }));
    out.map(|out| to_numpy(py, out)).map_err(to_python)
}
