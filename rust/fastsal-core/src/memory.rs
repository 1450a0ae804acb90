//! Memory whose size comes from arguments: an error where there is none, instead of an abort.

use std::alloc::{alloc_zeroed, Layout};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

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

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// A growing array that begins with a cache line: whole vectors of rows of whole lines lie in one line.
pub(crate) struct Aligned<T> {
    lines: Vec<Line>,
    element: PhantomData<T>,
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), element: PhantomData }
    }
}

impl<T: Zero> Aligned<T> {
    /// Lines that hold `len` elements.
    fn lines(len: usize) -> usize {
        const { assert!(size_of::<Line>().is_multiple_of(size_of::<T>())) };
        const { assert!(align_of::<T>() <= align_of::<Line>()) };
        len.div_ceil(size_of::<Line>() / size_of::<T>())
    }

    /// Make room for `len` elements in all, so that growing to this length cannot fail.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is no memory of this size.
    pub(crate) fn reserve(&mut self, what: &'static str, len: usize) -> Result<()> {
        let more = Self::lines(len).saturating_sub(self.lines.len());
        let bytes = len.saturating_mul(size_of::<T>());
        self.lines.try_reserve_exact(more).map_err(|_| Error::Memory { what, bytes })
    }

    /// Return the first `len` elements, with unspecified contents.
    pub(crate) fn room(&mut self, len: usize) -> &mut [T] {
        let lines = Self::lines(len);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 8]));
        }
        &mut self[..len]
    }

    /// Return `len` zeros.
    pub(crate) fn zeros(&mut self, len: usize) -> &mut [T] {
        self.lines.clear();
        self.lines.resize(Self::lines(len), Line([0; 8]));
        &mut self[..len]
    }
}

impl<T: Zero> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let len = self.lines.len() * (size_of::<Line>() / size_of::<T>());
        // SAFETY: the lines are that many elements, aligned for any of them (`lines`); they began as
        // zero bits, a value of `T`, and have been written only as `T` since.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), len) }
    }
}

impl<T: Zero> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let len = self.lines.len() * (size_of::<Line>() / size_of::<T>());
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
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
            assert!(Aligned::<f64>::default().reserve("x", len).is_err());
        }
    }

    #[test]
    fn aligned_arrays_begin_with_a_cache_line() {
        let mut array = Aligned::<f32>::default();
        assert!(array.is_empty());
        for len in [1, 15, 16, 17, 1000, 3] {
            let before = array.to_vec();
            let room = array.room(len);
            assert_eq!((room.len(), room.as_ptr().align_offset(64)), (len, 0));
            let kept = len.min(before.len());
            assert_eq!(room[..kept], before[..kept]);
            room.fill(len as f32);
        }
        assert_eq!(array.zeros(40), [0.0; 40]);
    }
}
