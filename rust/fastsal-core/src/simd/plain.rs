//! Operations on arrays, for the compiler to vectorize; unsafe like the intrinsics they replace.

use std::array::from_fn;
use std::ops::{Add, Div, Mul};

#[inline(always)]
pub(crate) unsafe fn zero<T: Copy + Default, const W: usize>() -> [T; W] {
    [T::default(); W]
}
#[inline(always)]
pub(crate) unsafe fn load<T, const W: usize>(p: *const T) -> [T; W] {
    // SAFETY: valid for W elements by contract.
    unsafe { std::ptr::read_unaligned(p.cast()) }
}
#[inline(always)]
pub(crate) unsafe fn store<T, const W: usize>(p: *mut T, v: [T; W]) {
    // SAFETY: valid for W elements by contract.
    unsafe { std::ptr::write_unaligned(p.cast(), v) }
}
#[inline(always)]
pub(crate) unsafe fn splat<T: Copy, const W: usize>(x: T) -> [T; W] {
    [x; W]
}
#[inline(always)]
pub(crate) unsafe fn add<T: Copy + Add<Output = T>, const W: usize>(
    a: [T; W],
    b: [T; W],
) -> [T; W] {
    from_fn(|i| a[i] + b[i])
}
#[inline(always)]
pub(crate) unsafe fn mul<T: Copy + Mul<Output = T>, const W: usize>(
    a: [T; W],
    b: [T; W],
) -> [T; W] {
    from_fn(|i| a[i] * b[i])
}
#[inline(always)]
pub(crate) unsafe fn div<T: Copy + Div<Output = T>, const W: usize>(
    a: [T; W],
    b: [T; W],
) -> [T; W] {
    from_fn(|i| a[i] / b[i])
}
#[inline(always)]
pub(crate) unsafe fn min<T: Copy + PartialOrd, const W: usize>(a: [T; W], b: [T; W]) -> [T; W] {
    from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
}
#[inline(always)]
pub(crate) unsafe fn max<T: Copy + PartialOrd, const W: usize>(a: [T; W], b: [T; W]) -> [T; W] {
    from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
}
#[inline(always)]
pub(crate) unsafe fn equal<T: Copy + PartialEq, const W: usize>(a: [T; W], b: [T; W]) -> u32 {
    (0..W).fold(0, |bits, i| bits | u32::from(a[i] == b[i]) << i)
}
#[inline(always)]
pub(crate) unsafe fn where_less<T: Copy + PartialOrd, const W: usize>(
    a: [T; W],
    b: [T; W],
    yes: [T; W],
    no: [T; W],
) -> [T; W] {
    from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
}
#[inline(always)]
pub(crate) unsafe fn where_equal<T: Copy + PartialEq, const W: usize>(
    a: [T; W],
    b: [T; W],
    yes: [T; W],
    no: [T; W],
) -> [T; W] {
    from_fn(|i| if a[i] == b[i] { yes[i] } else { no[i] })
}
macro_rules! mul_add {
    ($name:ident, $t:ty) => {
        #[inline(always)]
        pub(crate) unsafe fn $name<const W: usize>(a: [$t; W], b: [$t; W], c: [$t; W]) -> [$t; W] {
            from_fn(|i| {
                // Without an instruction for it, a fused product is a slow library call.
                if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                    a[i].mul_add(b[i], c[i])
                } else {
                    a[i] * b[i] + c[i]
                }
            })
        }
    };
}
mul_add!(mul_add_f32, f32);
mul_add!(mul_add_f64, f64);
macro_rules! sqrt {
    ($name:ident, $t:ty) => {
        #[inline(always)]
        pub(crate) unsafe fn $name<const W: usize>(a: [$t; W]) -> [$t; W] {
            from_fn(|i| a[i].sqrt())
        }
    };
}
sqrt!(sqrt_f32, f32);
sqrt!(sqrt_f64, f64);
