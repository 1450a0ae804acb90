//! The dual form.

use fastsal_core::{dual, Layout};
use numpy::PyReadonlyArray1;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::arrays::{optional, rows, to_numpy, AnyRows};
use crate::errors::to_python;
use crate::factor::Inverse;

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
    macro_rules! run {
        ($rows:expr) => {{
            let rows = $rows;
            let layout = Layout::new(rows.d(), block_size);
            py.detach(|| {
                let mut out = vec![0.0; layout.len];
                dual::inverse_diagonal(layout, rows, samples, kept, damping, &mut out)
                    .map(|report| (out, report))
            })
        }};
    }
    let result = match &AnyRows::new(gradients, dtype)? {
        AnyRows::F32(a) => run!(rows::<f32, f32>(a)?),
        AnyRows::F64(a) => run!(rows::<f64, f64>(a)?),
        _ => return Err(PyTypeError::new_err("expected dtype float32 or float64")),
    };
    let (out, report) = result.map_err(to_python)?;
    Ok((to_numpy(py, out), report.failed, to_numpy(py, report.sensitivity)))
}
