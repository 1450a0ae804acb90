//! Gradients before they are summed: are they finite, and how large are they?

use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::parallel;
use crate::parallel::prelude::*;
use crate::rows::{with_rows, AnyRows, Element, Rows};
use crate::simd::{dispatch, Kernel, Simd};

/// Report the first NaN or infinity of `rows`.
///
/// # Errors
/// [`Error::NonFiniteGradient`] with the least sample, and its least column, that holds one.
pub fn check_finite(rows: AnyRows<'_>) -> Result<()> {
    largest(rows).map(|_| ())
}

/// Return the largest magnitude of `rows`.
///
/// # Errors
/// Those of [`check_finite`].
pub fn largest(rows: AnyRows<'_>) -> Result<f64> {
    with_rows!(rows, r => largest_of(rows.n(), rows.d(), r))
}

fn largest_of<E: Element>(n: usize, d: usize, rows: Rows<'_, E>) -> Result<f64> {
    const COLUMNS: usize = 1 << 14;
    let (isa, parts) = (Isa::chosen()?, d.div_ceil(COLUMNS));
    let found: Vec<Result<f64>> = parallel::run(|| {
        let tasks = (0..n * parts).into_par_iter();
        tasks
            .map(|task| {
                let (row, from) = (task / parts, task % parts * COLUMNS);
                let values = rows.row(row, from, (from + COLUMNS).min(d));
                let largest = dispatch(isa, Largest { values });
                if largest.is_finite() {
                    return Ok(largest);
                }
                let is_wrong = |v: &E| !v.to_f64().is_finite();
                let at = values.iter().position(is_wrong).unwrap_or_default();
                let value = values[at].to_f64();
                Err(Error::NonFiniteGradient { row, column: from + at, value })
            })
            .collect()
    });
    found.into_iter().try_fold(0.0, |largest, found| Ok(f64::max(largest, found?)))
}

/// The largest magnitude; NaN or an infinity if one is among the values.
struct Largest<'a, E> {
    values: &'a [E],
}

impl<E: Element> Kernel<f32> for Largest<'_, E> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd<T = f32>>(self, _simd: S) -> f64 {
        // Magnitudes are ordered like their bits, NaN above infinity, and a fold of integers without
        // an early exit vectorizes.
        if size_of::<E>() == size_of::<f64>() {
            let bits = self.values.iter().map(|v| v.to_f64().abs().to_bits() as i64);
            return f64::from_bits(bits.fold(0, i64::max) as u64);
        }
        let bits = self.values.iter().map(|v| v.to_f32().abs().to_bits() as i32);
        f32::from_bits(bits.fold(0, i32::max) as u32).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use half::{bf16, f16};

    fn check<E: Element>(to: impl Fn(f64) -> E)
    where
        for<'a> Rows<'a, E>: Into<AnyRows<'a>>,
    {
        let (n, d, stride) = (3, 40_000, 40_007);
        let mut data: Vec<E> = random(5, n * stride).into_iter().map(&to).collect();
        data[2 * stride + 39_999] = to(-7.0);
        // Beyond the rows.
        data[d + 1] = to(f64::NAN);
        let largest_of = |data: &[E]| largest(Rows::new(data, n, d, stride).expect("rows").into());
        assert_eq!(largest_of(&data), Ok(7.0));
        for value in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            data[stride + 39_998] = to(value);
            match largest_of(&data) {
                Err(Error::NonFiniteGradient { row: 1, column: 39_998, value: found }) => {
                    assert!(found == value || found.is_nan() && value.is_nan());
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn equals_the_largest_magnitude() {
        check::<f64>(|x| x);
        check::<f32>(|x| x as f32);
        check::<f16>(f16::from_f64);
        check::<bf16>(bf16::from_f64);
        let rows = Rows::<f32>::new(&[], 0, 4, 4).expect("rows");
        assert_eq!(largest(rows.into()), Ok(0.0));
    }
}
