//! Accumulation of statistics.

use fastsal_core::{gram, Layout};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::arrays::{slice_mut, with_rows, AnyRows, FloatsMut};
use crate::errors::to_python;

/// Length of the packed statistics of a parameter of `d` weights.
#[pyfunction]
pub fn packed_len(d: usize, block_size: usize) -> usize {
    Layout::new(d, block_size).packed_len()
}

/// Add the statistics of rows `[n, d]` to `packed` and `sums`, in place; a `fresh` `packed` is
/// overwritten.
#[pyfunction]
#[pyo3(signature = (rows, dtype, block_size, packed, sums, fresh=false))]
pub fn accumulate<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyAny>,
    dtype: &str,
    block_size: usize,
    packed: FloatsMut<'py>,
    sums: FloatsMut<'py>,
    fresh: bool,
) -> PyResult<()> {
    let any = AnyRows::new(rows, dtype)?;
    with_rows!(&any, rows => {
        let layout = Layout::new(rows.d(), block_size);
        match (packed, sums) {
            (FloatsMut::F32(mut packed), FloatsMut::F32(mut sums)) => {
                let (packed, sums) = (slice_mut("packed", &mut packed)?, slice_mut("sums", &mut sums)?);
                py.detach(|| gram::accumulate(layout, rows, packed, sums, fresh))
            }
            (FloatsMut::F64(mut packed), FloatsMut::F64(mut sums)) => {
                let (packed, sums) = (slice_mut("packed", &mut packed)?, slice_mut("sums", &mut sums)?);
                py.detach(|| gram::accumulate(layout, rows, packed, sums, fresh))
            }
            _ => return Err(PyTypeError::new_err("packed and sums: must have the same type")),
        }
    })
    .map_err(to_python)
}

/// Raise `NonFiniteRowError` for the first NaN or infinity of rows `[n, d]`.
#[pyfunction]
pub fn check_finite<'py>(py: Python<'py>, rows: &Bound<'py, PyAny>, dtype: &str) -> PyResult<()> {
    let any = AnyRows::new(rows, dtype)?;
    with_rows!(&any, rows => py.detach(|| gram::check_finite(rows))).map_err(to_python)
}
