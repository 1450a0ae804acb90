//! The dual form.

use fastsal_core::{dual, Layout};
use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use crate::arrays::{must_be, optional, to_numpy, Gradients};
use crate::errors::to_python;
use crate::inverse::Inverse;
use crate::parallel::call;

/// `diag(A⁻¹)` of one parameter `[d]` from its gradients `[n, d]`, float32 or float64.
#[pyfunction]
#[pyo3(signature = (gradients, dtype, block_size, samples, kept, damping))]
pub fn dual_inverse_diagonal<'py>(
    py: Python<'py>,
    gradients: &Bound<'py, PyAny>,
    dtype: &str,
    block_size: usize,
    samples: f64,
    kept: Option<PyReadonlyArray1<'py, bool>>,
    damping: f64,
) -> PyResult<Inverse<'py>> {
    let kept = optional("kept", kept.as_ref())?;
    let gradients = Gradients::new(gradients, dtype)?;
    if !matches!(gradients, Gradients::F32(_) | Gradients::F64(_)) {
        return Err(must_be("dtype", "float32 or float64", dtype));
    }
    let rows = gradients.rows()?;
    let layout = Layout::new(rows.d(), block_size).map_err(to_python)?;
    // The Gram matrix, and a solution for each column.
    let n = rows.n() as u64;
    let work = (rows.d() as u64).saturating_mul(n.saturating_mul(n) / 4 + 8);
    let result = call(py, work, || {
        let mut out = vec![0.0; layout.len()];
        dual::inverse_diagonal(layout, rows, samples, kept, damping, &mut out)
            .map(|report| (out, report))
    });
    let (out, report) = result?;
    Ok((to_numpy(py, out), report.failed, to_numpy(py, report.sensitivity)))
}
