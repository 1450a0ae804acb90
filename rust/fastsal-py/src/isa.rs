//! Instruction sets.

use fastsal_core::Isa;
use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

/// Names of the instruction sets of this processor, slowest first, as `FASTSAL_ISA` takes them.
#[pyfunction]
pub fn instruction_sets() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::short_name).collect()
}

/// Refuse to import the module where `FASTSAL_ISA` names another instruction set.
pub fn check(py: Python<'_>) -> PyResult<()> {
    let Err(error) = Isa::chosen() else { return Ok(()) };
    let error = PyImportError::new_err(error.to_string());
    error.value(py).setattr("name", "fastsal._core")?;
    Err(error)
}
