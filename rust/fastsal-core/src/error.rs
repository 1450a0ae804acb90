//! The one error type of the core.

/// What can go wrong below the Python boundary.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An array has another length than its layout asks for.
    #[error("{what}: got length {got}, expected {expected}")]
    Length {
        /// Which array.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that the layout asks for.
        expected: usize,
    },
    /// A number is outside what is taken.
    #[error("{what}: got {got}, expected {expected}")]
    Value {
        /// Which argument.
        what: &'static str,
        /// What came.
        got: String,
        /// What is taken.
        expected: &'static str,
    },
    /// A gradient holds NaN or infinity.
    #[error("gradient of sample {row} is {value} at position {column}")]
    NonFiniteGradient {
        /// Row, that is the sample within this call.
        row: usize,
        /// Column, that is the flat position in the parameter.
        column: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// A score is NaN.
    #[error("score {index} of array {array} is NaN")]
    NanScore {
        /// Which array.
        array: usize,
        /// Flat position in it.
        index: usize,
    },
}

/// Result of a core function.
pub type Result<T> = std::result::Result<T, Error>;

/// `Ok` when an array has the length that its layout asks for.
pub(crate) fn check_length(what: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        Ok(())
    } else {
        Err(Error::Length { what, got, expected })
    }
}
