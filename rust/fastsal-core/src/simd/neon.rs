//! Registers of NEON, which every arm64 processor has.

use std::arch::aarch64::*;

use super::*;

registers! {
    NeonF32: f32, float32x4_t, 4 lanes of Portable, tiles of 8 rows, half Self;
    zero zero_f32, load vld1q_f32, store vst1q_f32, splat vdupq_n_f32,
    mul_add mul_add_f32, add vaddq_f32, mul vmulq_f32, div vdivq_f32,
    sqrt vsqrtq_f32, min min_f32, max max_f32;
    equal(a, b) vaddvq_u32(vandq_u32(vceqq_f32(a, b), vld1q_u32([1, 2, 4, 8].as_ptr())));
    where_less(yes, no) vbslq_f32(vcltq_f32(a, b), yes, no),
    where_equal vbslq_f32(vceqq_f32(a, b), yes, no);
    load_lanes(p, lo, hi) load_each::<Self, 4>(p, lo, hi);
    store_lanes(p, v) store_each::<Self, 4>(p, v, lo, hi);

    NeonF64: f64, float64x2_t, 2 lanes of Portable, tiles of 8 rows, half Self;
    zero zero_f64, load vld1q_f64, store vst1q_f64, splat vdupq_n_f64,
    mul_add mul_add_f64, add vaddq_f64, mul vmulq_f64, div vdivq_f64,
    sqrt vsqrtq_f64, min min_f64, max max_f64;
    equal(a, b) vaddvq_u64(vandq_u64(vceqq_f64(a, b), vld1q_u64([1, 2].as_ptr()))) as u32;
    where_less(yes, no) vbslq_f64(vcltq_f64(a, b), yes, no),
    where_equal vbslq_f64(vceqq_f64(a, b), yes, no);
    load_lanes(p, lo, hi) load_each::<Self, 2>(p, lo, hi);
    store_lanes(p, v) store_each::<Self, 2>(p, v, lo, hi);
}

/// Operations that are not one intrinsic with these arguments; unsafe like the others.
macro_rules! operations {
    ($v:ty; $zero:ident $dup:path, $mul_add:ident $fma:path, $min:ident $less:path, $max:ident $more:path, $select:path) => {
        #[inline(always)]
        unsafe fn $zero() -> $v {
            // SAFETY: every arm64 processor has NEON.
            unsafe { $dup(0.0) }
        }
        #[inline(always)]
        unsafe fn $mul_add(a: $v, b: $v, c: $v) -> $v {
            // SAFETY: as above.
            unsafe { $fma(c, a, b) }
        }
        // The instructions for it return NaN where either is NaN.
        #[inline(always)]
        unsafe fn $min(a: $v, b: $v) -> $v {
            // SAFETY: as above.
            unsafe { $select($less(a, b), a, b) }
        }
        #[inline(always)]
        unsafe fn $max(a: $v, b: $v) -> $v {
            // SAFETY: as above.
            unsafe { $select($more(a, b), a, b) }
        }
    };
}
operations!(
    float32x4_t; zero_f32 vdupq_n_f32, mul_add_f32 vfmaq_f32, min_f32 vcltq_f32, max_f32 vcgtq_f32,
    vbslq_f32
);
operations!(
    float64x2_t; zero_f64 vdupq_n_f64, mul_add_f64 vfmaq_f64, min_f64 vcltq_f64, max_f64 vcgtq_f64,
    vbslq_f64
);
