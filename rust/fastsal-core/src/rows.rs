//! Borrowed gradient rows `[n, d]` in the element types that PyTorch produces.

use half::{bf16, f16};

use crate::error::{Error, Result};
#[cfg(target_arch = "x86_64")]
use crate::isa::Set;
use crate::simd::{Simd, PADDING};

/// `n` rows of `d` contiguous elements; consecutive rows start `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a, E> {
    data: &'a [E],
    n: usize,
    d: usize,
    stride: usize,
}

impl<'a, E: Element> Rows<'a, E> {
    /// Borrow rows.
    ///
    /// # Errors
    /// [`Error::Length`] when `data` ends before the last row does.
    pub fn new(data: &'a [E], n: usize, d: usize, stride: usize) -> Result<Self> {
        // Rows without elements are nowhere.
        let stride = if d == 0 { 0 } else { stride };
        let needed = match n.checked_sub(1) {
            None => Some(0),
            Some(before) => before.checked_mul(stride).and_then(|start| start.checked_add(d)),
        };
        match needed {
            Some(needed) if needed <= data.len() => Ok(Self { data, n, d, stride }),
            _ => {
                let expected = needed.unwrap_or(usize::MAX);
                Err(Error::Length { what: "rows", got: data.len(), expected })
            }
        }
    }

    /// The rows from row `r` on.
    #[inline(always)]
    pub(crate) fn from(&self, r: usize) -> Self {
        let data = self.data.get(r * self.stride..).unwrap_or_default();
        Self { data, n: self.n.saturating_sub(r), ..*self }
    }

    /// Columns `from..to` of row `r`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize, from: usize, to: usize) -> &'a [E] {
        let start = r * self.stride;
        &self.data[start + from..start + to]
    }
}

/// Rows of any element type.
#[derive(Debug, Clone, Copy)]
pub enum AnyRows<'a> {
    /// Single precision.
    F32(Rows<'a, f32>),
    /// Double precision.
    F64(Rows<'a, f64>),
    /// Half precision.
    F16(Rows<'a, f16>),
    /// Brain floating point.
    Bf16(Rows<'a, bf16>),
}

/// Evaluate `$body` with `$rows: Rows<E>` for the element type at hand.
macro_rules! with_rows {
    ($any:expr, $rows:ident => $body:expr) => {
        match $any {
            $crate::rows::AnyRows::F32($rows) => $body,
            $crate::rows::AnyRows::F64($rows) => $body,
            $crate::rows::AnyRows::F16($rows) => $body,
            $crate::rows::AnyRows::Bf16($rows) => $body,
        }
    };
}
pub(crate) use with_rows;

impl AnyRows<'_> {
    /// Number of samples, `n`.
    #[must_use]
    pub fn n(&self) -> usize {
        with_rows!(self, rows => rows.n)
    }

    /// Number of weights, `d`.
    #[must_use]
    pub fn d(&self) -> usize {
        with_rows!(self, rows => rows.d)
    }

    /// Columns `column..column + len` of rows from `row` on, as addresses; they may lie past the end.
    pub(crate) fn bytes(&self, row: usize, column: usize, len: usize) -> RowBytes {
        fn bytes<E>(rows: &Rows<'_, E>, row: usize, column: usize, len: usize) -> RowBytes {
            let start = rows.data.as_ptr().wrapping_add(row * rows.stride + column);
            let size = size_of::<E>();
            RowBytes { start: start.cast(), len: len * size, stride: rows.stride * size }
        }
        with_rows!(self, rows => bytes(rows, row, column, len))
    }
}

macro_rules! from_rows {
    ($($e:ty => $variant:ident),*) => {
        $(impl<'a> From<Rows<'a, $e>> for AnyRows<'a> {
            fn from(rows: Rows<'a, $e>) -> Self {
                Self::$variant(rows)
            }
        })*
    };
}
from_rows!(f32 => F32, f64 => F64, f16 => F16, bf16 => Bf16);

/// The memory of some columns of consecutive rows, in bytes.
pub(crate) struct RowBytes {
    pub start: *const u8,
    pub len: usize,
    /// From the start of one row to the next.
    pub stride: usize,
}

/// An element type of gradient rows. Conversions are plain operations, so loops over them vectorize,
/// and compute with normal numbers alone: no environment of the processor changes their results.
pub trait Element: Copy + Send + Sync + 'static {
    /// Convert to single precision; exact except from `f64`.
    fn to_f32(self) -> f32;
    /// Convert to double precision; exact.
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.to_f32().into()
    }
    /// [`Element::to_f32`] of neighbors, with the instruction set of a kernel.
    #[inline(always)]
    fn to_f32s<S: Simd>(_simd: S, values: [Self; PADDING]) -> [f32; PADDING] {
        values.map(Self::to_f32)
    }
    /// [`Element::to_f64`] of neighbors, with the instruction set of a kernel.
    #[inline(always)]
    fn to_f64s<S: Simd>(_simd: S, values: [Self; PADDING]) -> [f64; PADDING] {
        values.map(Self::to_f64)
    }
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f64 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = (bits & 0x7fff) << 13;
        // The exponents of the two types are 112 apart, those of infinity and NaN twice as much.
        let is_special = magnitude >= 0x7c00 << 13;
        let normal = magnitude + (if is_special { 224 } else { 112 } << 23);
        // A subnormal number is what it adds to the least normal one, 2^-14.
        let least = 113 << 23;
        let subnormal = (f32::from_bits(magnitude + least) - f32::from_bits(least)).to_bits();
        let value = if magnitude < 0x0400 << 13 { subnormal & 0x7fff_ffff } else { normal };
        f32::from_bits(value | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn to_f32s<S: Simd>(_simd: S, values: [Self; PADDING]) -> [f32; PADDING] {
        #[cfg(target_arch = "x86_64")]
        if S::SET != Set::Portable {
            use std::arch::x86_64::{_mm256_cvtph_ps, _mm256_storeu_ps, _mm_loadu_si128};
            let mut wide = [0.0; PADDING];
            for (to, from) in wide.chunks_exact_mut(8).zip(values.chunks_exact(8)) {
                // The conversion does not depend on the floating-point environment.
                // SAFETY: eight elements each; `_simd` is the proof of the instruction set.
                unsafe {
                    let from = _mm_loadu_si128(from.as_ptr().cast());
                    _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(from));
                }
            }
            return wide;
        }
        values.map(Self::to_f32)
    }
    #[inline(always)]
    fn to_f64s<S: Simd>(simd: S, values: [Self; PADDING]) -> [f64; PADDING] {
        Self::to_f32s(simd, values).map(f64::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::simd::{dispatch, Kernel};

    /// All numbers of half precision, sixteen at a time.
    struct All;
    impl Kernel<f32> for All {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd<T = f32>>(self, simd: S) -> Vec<f32> {
            let starts = (0..=u16::MAX).step_by(PADDING);
            let numbers = |start| std::array::from_fn(|i| f16::from_bits(start + i as u16));
            starts.flat_map(|start| f16::to_f32s(simd, numbers(start))).collect()
        }
    }

    /// Compare the conversions of all numbers, converted as vectors, with those of `half`.
    fn check_half(theirs: &[(f32, f32)]) {
        let ours: Vec<(f32, f32)> = (0..=u16::MAX)
            .map(|bits| (f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()))
            .collect();
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        for (bits, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            assert!(same(ours.0, theirs.0), "{bits:#x}: {} {}", ours.0, theirs.0);
            assert!(same(ours.1, theirs.1), "{bits:#x}: {} {}", ours.1, theirs.1);
        }
        for isa in Isa::available() {
            let ours = dispatch(isa, All);
            assert!(ours.iter().zip(theirs).all(|(ours, theirs)| same(*ours, theirs.0)), "{isa:?}");
        }
    }

    #[test]
    fn half_is_exact() {
        let theirs = |bits| {
            (half::f16::to_f32(f16::from_bits(bits)), half::bf16::to_f32(bf16::from_bits(bits)))
        };
        let theirs: Vec<(f32, f32)> = (0..=u16::MAX).map(theirs).collect();
        check_half(&theirs);
        for environment in crate::floats::OTHERS {
            let _theirs = crate::floats::Floats::of_caller(*environment);
            check_half(&theirs);
        }
    }

    #[test]
    fn rows_must_fit() {
        assert!(Rows::new(&[0.0f32; 10], 2, 4, 6).is_ok());
        assert!(Rows::new(&[0.0f32; 9], 2, 4, 6).is_err());
        assert!(Rows::new(&[0.0f32; 9], 3, 4, usize::MAX / 2).is_err());
        assert!(Rows::new(&[0.0f32; 9], 2, usize::MAX, 1).is_err());
        assert!(Rows::<f32>::new(&[], 0, 4, 4).is_ok());
    }

    #[test]
    fn rows_without_elements_are_empty() {
        let rows = Rows::<f32>::new(&[], 5, 0, 3).expect("rows");
        for r in 0..5 {
            assert!(rows.row(r, 0, 0).is_empty() && rows.from(r).row(0, 0, 0).is_empty());
        }
        assert_eq!(AnyRows::from(rows).n(), 5);
    }
}
