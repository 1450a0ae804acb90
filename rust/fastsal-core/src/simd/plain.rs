//! Registers that are arrays, for the compiler to vectorize; the operations on them are unsafe like the
//! intrinsics they replace.

use std::array::from_fn;
use std::ops::{Add, Div, Mul};

use super::{load_each, store_each, Set, Simd};

registers! {
    PortableF32: f32, [f32; 4], 4 lanes of Portable, tiles of 4 rows, half Self;
    zero zero, load load, store store, splat splat,
    mul_add mul_add_f32, add add, mul mul, div div,
    sqrt sqrt_f32, min min, max max;
    equal(a, b) equal(a, b);
    where_less(yes, no) where_less(a, b, yes, no),
    where_equal where_equal(a, b, yes, no);
    load_lanes(p, lo, hi) load_each::<Self, 4>(p, lo, hi);
    store_lanes(p, v) store_each::<Self, 4>(p, v, lo, hi);

    PortableF64: f64, [f64; 2], 2 lanes of Portable, tiles of 4 rows, half Self;
    zero zero, load load, store store, splat splat,
    mul_add mul_add_f64, add add, mul mul, div div,
    sqrt sqrt_f64, min min, max max;
    equal(a, b) equal(a, b);
    where_less(yes, no) where_less(a, b, yes, no),
    where_equal where_equal(a, b, yes, no);
    load_lanes(p, lo, hi) load_each::<Self, 2>(p, lo, hi);
    store_lanes(p, v) store_each::<Self, 2>(p, v, lo, hi);
}

#[inline(always)]
unsafe fn zero<T: Copy + Default, const W: usize>() -> [T; W] {
    [T::default(); W]
}
#[inline(always)]
unsafe fn load<T, const W: usize>(p: *const T) -> [T; W] {
    // SAFETY: valid for W elements by contract.
    unsafe { std::ptr::read_unaligned(p.cast()) }
}
#[inline(always)]
unsafe fn store<T, const W: usize>(p: *mut T, v: [T; W]) {
    // SAFETY: valid for W elements by contract.
    unsafe { std::ptr::write_unaligned(p.cast(), v) }
}
#[inline(always)]
unsafe fn splat<T: Copy, const W: usize>(x: T) -> [T; W] {
    [x; W]
}
#[inline(always)]
unsafe fn add<T: Copy + Add<Output = T>, const W: usize>(a: [T; W], b: [T; W]) -> [T; W] {
    from_fn(|i| a[i] + b[i])
}
#[inline(always)]
unsafe fn mul<T: Copy + Mul<Output = T>, const W: usize>(a: [T; W], b: [T; W]) -> [T; W] {
    from_fn(|i| a[i] * b[i])
}
#[inline(always)]
unsafe fn div<T: Copy + Div<Output = T>, const W: usize>(a: [T; W], b: [T; W]) -> [T; W] {
    from_fn(|i| a[i] / b[i])
}
#[inline(always)]
unsafe fn min<T: Copy + PartialOrd, const W: usize>(a: [T; W], b: [T; W]) -> [T; W] {
    from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
}
#[inline(always)]
unsafe fn max<T: Copy + PartialOrd, const W: usize>(a: [T; W], b: [T; W]) -> [T; W] {
    from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
}
#[inline(always)]
unsafe fn equal<T: Copy + PartialEq, const W: usize>(a: [T; W], b: [T; W]) -> u32 {
    (0..W).fold(0, |bits, i| bits | u32::from(a[i] == b[i]) << i)
}
#[inline(always)]
unsafe fn where_less<T: Copy + PartialOrd, const W: usize>(
    a: [T; W],
    b: [T; W],
    yes: [T; W],
    no: [T; W],
) -> [T; W] {
    from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
}
#[inline(always)]
unsafe fn where_equal<T: Copy + PartialEq, const W: usize>(
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
        unsafe fn $name<const W: usize>(a: [$t; W], b: [$t; W], c: [$t; W]) -> [$t; W] {
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
        unsafe fn $name<const W: usize>(a: [$t; W]) -> [$t; W] {
            from_fn(|i| a[i].sqrt())
        }
    };
}
sqrt!(sqrt_f32, f32);
sqrt!(sqrt_f64, f64);
