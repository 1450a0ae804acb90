//! Borrowed gradient rows `[n, d]` in the element types that PyTorch hands over.

use half::{bf16, f16};

use crate::error::{check_length, Result};

/// `n` rows of `d` elements each; rows lie `stride` elements apart, elements side by side.
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
        let needed = if n == 0 { 0 } else { (n - 1) * stride + d };
        if data.len() < needed {
            check_length("rows", data.len(), needed)?;
        }
        Ok(Self { data, n, d, stride })
    }

    /// Number of samples, `n`.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Number of weights, `d`.
    #[must_use]
    pub fn d(&self) -> usize {
        self.d
    }

    /// Elements from one row to the next.
    #[must_use]
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Where row `r`, column `c` lies or would lie; not to be read.
    #[must_use]
    pub(crate) fn address(&self, r: usize, c: usize) -> *const E {
        self.data.as_ptr().wrapping_add(r * self.stride + c)
    }

    /// The rows from row `r` on.
    #[must_use]
    pub fn from(&self, r: usize) -> Self {
        let data = self.data.get(r * self.stride..).unwrap_or_default();
        Self { data, n: self.n.saturating_sub(r), ..*self }
    }

    /// Columns `from..to` of row `r`.
    #[must_use]
    pub fn row(&self, r: usize, from: usize, to: usize) -> &'a [E] {
        let start = r * self.stride;
        &self.data[start + from..start + to]
    }
}

/// An element type of gradient rows. Conversions are plain arithmetic, so loops over them vectorise.
pub trait Element: Copy + Send + Sync + 'static {
    /// The value in single precision (exact but from `f64`).
    fn to_f32(self) -> f32;
    /// The value in double precision (exact).
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.to_f32().into()
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
        // Moving the exponent by a product makes subnormal halves right, too.
        let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
        let special = if magnitude >= 0x7c00 << 13 { 0xff << 23 } else { 0 };
        f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_is_exact() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) =
                (Element::to_f32(f16::from_bits(bits)), f16::from_bits(bits).to_f32());
            assert!(
                ours == theirs || ours.is_nan() && theirs.is_nan(),
                "{bits:#x}: {ours} {theirs}"
            );
            let (ours, theirs) =
                (Element::to_f32(bf16::from_bits(bits)), bf16::from_bits(bits).to_f32());
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan());
        }
    }

    #[test]
    fn rows_must_fit() {
        assert!(Rows::new(&[0.0f32; 10], 2, 4, 6).is_ok());
        assert!(Rows::new(&[0.0f32; 9], 2, 4, 6).is_err());
    }
}
