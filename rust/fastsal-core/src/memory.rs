//! Memory whose size comes from arguments: an error where there is none, instead of an abort.

use std::alloc::{alloc_zeroed, Layout};

use crate::error::{Error, Result};

/// A type whose value of all zero bits is zero (or false).
///
/// # Safety
/// All zero bits are a value of the type, and it has no size of zero.
pub unsafe trait Zero: Copy {}
// SAFETY: all zero bits are zero, of numbers, and false.
unsafe impl Zero for f32 {}
// SAFETY: as above.
unsafe impl Zero for f64 {}
// SAFETY: as above.
unsafe impl Zero for u32 {}
// SAFETY: as above.
unsafe impl Zero for u64 {}
// SAFETY: as above.
unsafe impl Zero for bool {}

/// Return `len` zeros, in memory that the system has not touched yet where they are many.
///
/// # Errors
/// [`Error::Memory`] when there is no memory of this size.
pub fn zeros<T: Zero>(what: &'static str, len: usize) -> Result<Vec<T>> {
    let none = || Error::Memory { what, bytes: len.saturating_mul(size_of::<T>()) };
    let layout = Layout::array::<T>(len).map_err(|_| none())?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the size is not zero.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        return Err(none());
    }
    // SAFETY: the global allocator, which `Vec` uses, returned the memory for this very layout, and
    // its zero bits are `len` values of `T`.
    Ok(unsafe { Vec::from_raw_parts(memory.cast(), len, len) })
}

/// Make room for `len` elements in all, so that growing to this length cannot fail.
///
/// # Errors
/// [`Error::Memory`] when there is no memory of this size.
pub(crate) fn reserve<T>(what: &'static str, v: &mut Vec<T>, len: usize) -> Result<()> {
    let more = len.saturating_sub(v.len());
    let bytes = len.saturating_mul(size_of::<T>());
    v.try_reserve_exact(more).map_err(|_| Error::Memory { what, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zero_and_too_many_are_an_error() {
        assert_eq!(zeros::<f64>("x", 1000).expect("memory"), vec![0.0; 1000]);
        assert_eq!(zeros::<bool>("x", 3).expect("memory"), [false; 3]);
        assert!(zeros::<u32>("x", 0).expect("memory").is_empty());
        for len in [usize::MAX, usize::MAX / 8, 1 << 60] {
            let bytes = len.saturating_mul(8);
            assert_eq!(zeros::<f64>("x", len), Err(Error::Memory { what: "x", bytes }));
            assert!(reserve("x", &mut vec![1.0f64], len).is_err());
        }
    }
}
