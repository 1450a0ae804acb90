//! The dual form.

use fastsal_core::memory::zeros;
use fastsal_core::{dual, Layout};
use pyo3::prelude::*;

use crate::arrays::{must_be, to_numpy, Gradients, Mask};
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
    kept: Option<Mask>,
    damping: f64,
) -> PyResult<Inverse<'py>> {
    let kept = kept.as_ref().map(Mask::as_slice);
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
        let mut out = zeros("the diagonals", layout.len())?;
        dual::inverse_diagonal(layout, rows, samples, kept, damping, &mut out)
            .map(|report| (out, report))
    });
    let (out, report) = result?;
    Ok((to_numpy(py, out), report.failed, to_numpy(py, report.sensitivity)))
}
