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
    /// A weight is NaN or infinite.
    #[error("weights must be finite, got {value} at position {index}")]
    NonFiniteWeight {
        /// Flat position in the parameter.
        index: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// There is no memory of the size that the arguments ask for.
    #[error("{what} must fit into memory, got {bytes} bytes")]
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// Its size; `usize::MAX` where it has no number.
        bytes: usize,
    },
    /// The environment names an instruction set that this processor does not have.
    #[error("FASTSAL_ISA must be an instruction set of this processor ({available}), got {got:?}")]
    Isa {
        /// The name.
        got: String,
        /// The names that are accepted.
        available: String,
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

/// Require a finite number above zero whose inverse is finite, too.
pub(crate) fn check_positive(what: &'static str, value: f64) -> Result<()> {
    // Every normal number has a normal or subnormal inverse; those of the least ones overflow.
    if value >= f64::MIN_POSITIVE && value.is_finite() {
        return Ok(());
    }
    let expected = "a finite number of at least 2.3e-308";
    Err(Error::Value { what, got: format!("{value:e}"), expected })
}

/// Require that no weight is NaN or infinite.
pub(crate) fn check_weights(weights: &[f32]) -> Result<()> {
    // Two integer operations, and a fold without an early exit, vectorize.
    const EXPONENT: u32 = f32::INFINITY.to_bits();
    let finite = |w: &f32| w.to_bits() & EXPONENT != EXPONENT;
    for (part, some) in weights.chunks(1 << 12).enumerate() {
        if !some.iter().fold(true, |all, w| all & finite(w)) {
            if let Some(at) = some.iter().position(|w| !finite(w)) {
                return Err(Error::NonFiniteWeight { index: (part << 12) + at, value: some[at] });
            }
        }
    }
    Ok(())
}
