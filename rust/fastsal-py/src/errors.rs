//! The one table from core errors to Python exceptions.

use fastsal_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyArithmeticError, PyKeyboardInterrupt, PyMemoryError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    fastsal._core,
    NonFiniteRowError,
    PyArithmeticError,
    "A gradient is NaN or infinite; args: (row, column, value)."
);
create_exception!(
    fastsal._core,
    LargeRowError,
    PyArithmeticError,
    "Squares of gradients overflow the type of the sums; args: (row, column, value)."
);
create_exception!(
    fastsal._core,
    NanScoreError,
    PyArithmeticError,
    "A score is NaN; args: (array, index)."
);

/// Convert a core error.
pub fn to_python(error: Error) -> PyErr {
    match error {
        Error::NonFiniteGradient { row, column, value } => {
            NonFiniteRowError::new_err((row, column, value))
        }
        Error::Overflow { row, column, value } => LargeRowError::new_err((row, column, value)),
        // What a signal handler raised is raised instead, if there is an interpreter.
        Error::Interrupted => PyKeyboardInterrupt::new_err(error.to_string()),
        Error::NanScore { array, index } => NanScoreError::new_err((array, index)),
        Error::Memory { .. } => PyMemoryError::new_err(error.to_string()),
        Error::Length { .. }
        | Error::Value { .. }
        | Error::NonFiniteWeight { .. }
        | Error::Isa { .. } => PyValueError::new_err(error.to_string()),
    }
}
