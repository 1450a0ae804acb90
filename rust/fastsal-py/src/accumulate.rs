//! Accumulation of statistics.

use fastsal_core::accumulate::{self as core, Sums};
use fastsal_core::{finite, Isa, Layout};
use pyo3::prelude::*;

use crate::arrays::{check_apart, must_be, slice_mut, FloatsMut, Gradients};
use crate::errors::to_python;
use crate::parallel::{call, call_to_the_end};

/// Length of the packed statistics of a parameter of `d` weights.
#[pyfunction]
pub fn packed_len(d: usize, block_size: usize) -> PyResult<usize> {
    Layout::new(d, block_size).map(|layout| layout.packed_len()).map_err(to_python)
}

/// Add the statistics of rows `[n, d]` to `packed` and `sums`, in place; a `fresh` `packed` is
/// overwritten.
///
/// Only a call with `fresh` can be interrupted; `sums` are then as they were.
#[pyfunction]
#[pyo3(signature = (rows, dtype, block_size, packed, sums, fresh=false))]
pub fn accumulate<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyAny>,
    dtype: &str,
    block_size: usize,
    mut packed: FloatsMut<'py>,
    mut sums: FloatsMut<'py>,
    fresh: bool,
) -> PyResult<()> {
    let gradients = Gradients::new(rows, dtype)?;
    check_apart(&gradients, &packed, &sums)?;
    let rows = gradients.rows()?;
    let layout = Layout::new(rows.d(), block_size).map_err(to_python)?;
    let isa = Isa::chosen().map_err(to_python)?;
    let sums = match (&mut packed, &mut sums) {
        (FloatsMut::F32(packed), FloatsMut::F32(sums)) => {
            Sums::F32 { packed: slice_mut("packed", packed)?, sums: slice_mut("sums", sums)? }
        }
        (FloatsMut::F64(packed), FloatsMut::F64(sums)) => {
            Sums::F64 { packed: slice_mut("packed", packed)?, sums: slice_mut("sums", sums)? }
        }
        _ => return Err(must_be("sums", "of the type of packed", "another type")),
    };
    // A product for each entry of a triangle, sixteen of them in a nanosecond, and the triangle itself.
    let [d, n, block] = [rows.d(), rows.n(), layout.block()].map(|count| count as u64);
    let work = d.saturating_mul(n + 8).saturating_mul(block + 16) / 32;
    let job = || core::accumulate(isa, layout, rows, sums, fresh);
    if fresh {
        call(py, work, job)
    } else {
        call_to_the_end(py, work, job)
    }
}

/// Return the largest magnitude of rows `[n, d]`; raise `NonFiniteRowError` for the first NaN or
/// infinity.
#[pyfunction]
pub fn largest<'py>(py: Python<'py>, rows: &Bound<'py, PyAny>, dtype: &str) -> PyResult<f64> {
    let gradients = Gradients::new(rows, dtype)?;
    let rows = gradients.rows()?;
    call(py, (rows.n() as u64).saturating_mul(rows.d() as u64), || finite::largest(rows))
}
