//! The error type of the core.

/// An error of a core function.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An array has a length other than its layout requires.
    #[error("{what} must have length {expected}, got {got}")]
    Length {
        /// Name of the argument.
        what: &'static str,
        /// Length of the array.
        got: usize,
        /// Length that the layout requires.
        expected: usize,
    },
    /// An argument is outside its range.
    #[error("{what} must be {expected}, got {got}")]
    Value {
        /// Name of the argument.
        what: &'static str,
        /// The value.
        got: String,
        /// The values that are accepted.
        expected: &'static str,
    },
    /// A gradient is NaN or infinite.
    #[error("gradients must be finite, got {value} for sample {row} at position {column}")]
    NonFiniteGradient {
        /// Row: the sample within this call.
        row: usize,
        /// Column: the flat position in the parameter.
        column: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// The squares of finite gradients are too large for the type of the sums.
    #[error("squares of gradients must fit the type of the sums, got {value} for sample {row} at position {column}")]
    Overflow {
        /// Row: the sample with the largest gradient at this position.
        row: usize,
        /// Column: the flat position in the parameter.
        column: usize,
        /// The gradient.
        value: f64,
    },
    /// The caller said to stop.
    #[error("the call must run to its end, got an interrupt")]
    Interrupted,
    /// A score is NaN.
    #[error("scores must be numbers, got NaN at position {index} of array {array}")]
    NanScore {
        /// Number of the array.
        array: usize,
        /// Flat position in the array.
        index: usize,
    },
}

/// Result of a core function.
pub type Result<T> = std::result::Result<T, Error>;

/// Require that an array has the length that its layout asks for.
pub(crate) fn check_length(what: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        Ok(())
    } else {
        Err(Error::Length { what, got, expected })
    }
}

/// Require a finite number above zero.
pub(crate) fn check_positive(what: &'static str, value: f64) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::Value { what, got: value.to_string(), expected: "a finite number above zero" })
}
