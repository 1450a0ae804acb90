//! Vector instructions behind one small trait, selected at run time.
//!
//! A kernel is written once, generic over [`Simd`], as an `#[inline(always)]` function; [`dispatch`]
//! instantiates it for each instruction set. One table maps the operations of the trait to
//! intrinsics. On arm64 NEON is part of the baseline, and takes the place of the portable lanes.

#[cfg(target_arch = "x86_64")]
mod avx2;

use crate::isa::{Isa, Set};
use crate::memory::Zero;
use crate::rows::Element;

/// `W` lanes of one real type. Every function reads or writes `W` lanes from its pointer.
///
/// A value is the proof that the processor has the instruction set: only [`dispatch`] makes one, and
/// safe functions that run vector instructions take one.
///
/// # Safety
/// Callers run the functions only on a processor that has the instruction set, on pointers that are
/// valid for `W` elements (for the elements in `lo..hi`, where a range is given).
pub trait Simd: Copy {
    /// Element type.
    type T: Real;
    /// Register.
    type V: Copy;
    /// Instruction set of the registers.
    const SET: Set;
    /// Lanes of a register.
    const W: usize;
    /// Rows of a register tile.
    const ROWS: usize;
    /// Registers of half the lanes, where those cost less; otherwise the same.
    type Half: Simd<T = Self::T>;
    /// Whether `Half` is a half.
    const HALVES: bool = Self::Half::W < Self::W;

    /// Make a value.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn new() -> Self;
    /// The instruction set, as kernels are dispatched with it.
    #[inline(always)]
    fn isa(self) -> Isa {
        // SAFETY: this value is the proof.
        unsafe { Isa::assume(Self::SET) }
    }
    unsafe fn zero() -> Self::V;
    unsafe fn load(p: *const Self::T) -> Self::V;
    unsafe fn splat(p: *const Self::T) -> Self::V;
    /// `a * b + c`
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sqrt(a: Self::V) -> Self::V;
    /// The smaller one; `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The larger one; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Bit `i` says whether lane `i` is the same in both.
    unsafe fn equal(a: Self::V, b: Self::V) -> u32;
    /// `yes` where `a < b`, and `no` elsewhere, also where either is NaN.
    unsafe fn where_less(a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// `yes` where `a == b`, and `no` elsewhere, also where either is NaN.
    unsafe fn where_equal(a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    unsafe fn store(p: *mut Self::T, v: Self::V);
    /// Lanes `lo..hi`; the others are zero.
    unsafe fn load_lanes(p: *const Self::T, lo: usize, hi: usize) -> Self::V;
    /// Lanes `lo..hi`; the others are not written.
    unsafe fn store_lanes(p: *mut Self::T, v: Self::V, lo: usize, hi: usize);
}

/// The table: a row for each register, one operation after the other. Comparisons and the two functions
/// of some lanes are expressions in the names in the parentheses before them.
macro_rules! registers {
    ($(
        $name:ident: $t:ty, $v:ty, $w:literal lanes of $isa:ident, tiles of $rows:literal rows, half $half:ty;
        zero $zero:path, load $load:path, store $store:path, splat $splat:path, mul_add $fma:path,
        add $add:path, mul $mul:path, div $div:path, sqrt $sqrt:path, min $min:path, max $max:path;
        equal($a:ident, $b:ident) $equal:expr;
        where_less($yes:ident, $no:ident) $less:expr, where_equal $same:expr;
        load_lanes($from:ident, $lo:ident, $hi:ident) $load_lanes:expr;
        store_lanes($to:ident, $value:ident) $store_lanes:expr;
    )*) => {$(
        #[derive(Clone, Copy)]
        pub struct $name(());

        impl Simd for $name {
            type T = $t;
            type V = $v;
            type Half = $half;
            const SET: Set = Set::$isa;
            const W: usize = $w;
            const ROWS: usize = $rows;
            #[inline(always)]
            unsafe fn new() -> Self {
                Self(())
            }
            #[inline(always)]
            unsafe fn zero() -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $zero() }
            }
            #[inline(always)]
            unsafe fn load(p: *const $t) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $load(p) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut $t, v: $v) {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $store(p, v) }
            }
            #[inline(always)]
            unsafe fn splat(p: *const $t) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $splat(*p) }
            }
            #[inline(always)]
            unsafe fn mul_add(a: $v, b: $v, c: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $fma(a, b, c) }
            }
            #[inline(always)]
            unsafe fn add(a: $v, b: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: $v, b: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $mul(a, b) }
            }
            #[inline(always)]
            unsafe fn div(a: $v, b: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $div(a, b) }
            }
            #[inline(always)]
            unsafe fn sqrt(a: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $sqrt(a) }
            }
            #[inline(always)]
            unsafe fn min(a: $v, b: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $min(a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: $v, b: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $max(a, b) }
            }
            #[inline(always)]
            unsafe fn equal($a: $v, $b: $v) -> u32 {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $equal }
            }
            #[inline(always)]
            unsafe fn where_less($a: $v, $b: $v, $yes: $v, $no: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $less }
            }
            #[inline(always)]
            unsafe fn where_equal($a: $v, $b: $v, $yes: $v, $no: $v) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $same }
            }
            #[inline(always)]
            unsafe fn load_lanes($from: *const $t, $lo: usize, $hi: usize) -> $v {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $load_lanes }
            }
            #[inline(always)]
            unsafe fn store_lanes($to: *mut $t, $value: $v, $lo: usize, $hi: usize) {
                // SAFETY: the instruction set and valid pointers, by contract.
                unsafe { $store_lanes }
            }
        }
    )*};
}

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(not(target_arch = "aarch64"))]
mod plain;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
registers! {
    Avx2F32: f32, __m256, 8 lanes of Avx2, tiles of 6 rows, half Self;
    zero _mm256_setzero_ps, load _mm256_loadu_ps, store _mm256_storeu_ps, splat _mm256_set1_ps,
    mul_add _mm256_fmadd_ps, add _mm256_add_ps, mul _mm256_mul_ps, div _mm256_div_ps,
    sqrt _mm256_sqrt_ps, min _mm256_min_ps, max _mm256_max_ps;
    equal(a, b) _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(a, b)) as u32;
    where_less(yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)),
    where_equal _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b));
    load_lanes(p, lo, hi) _mm256_maskload_ps(p, avx2::window(lo, hi));
    store_lanes(p, v) avx2::store_window(p, v, lo, hi);

    Avx2F64: f64, __m256d, 4 lanes of Avx2, tiles of 6 rows, half Self;
    zero _mm256_setzero_pd, load _mm256_loadu_pd, store _mm256_storeu_pd, splat _mm256_set1_pd,
    mul_add _mm256_fmadd_pd, add _mm256_add_pd, mul _mm256_mul_pd, div _mm256_div_pd,
    sqrt _mm256_sqrt_pd, min _mm256_min_pd, max _mm256_max_pd;
    equal(a, b) _mm256_movemask_pd(_mm256_cmp_pd::<_CMP_EQ_OQ>(a, b)) as u32;
    where_less(yes, no) _mm256_blendv_pd(no, yes, _mm256_cmp_pd::<_CMP_LT_OQ>(a, b)),
    where_equal _mm256_blendv_pd(no, yes, _mm256_cmp_pd::<_CMP_EQ_OQ>(a, b));
    load_lanes(p, lo, hi) _mm256_maskload_pd(p, avx2::window(2 * lo, 2 * hi));
    store_lanes(p, v) avx2::store_window(p.cast(), _mm256_castpd_ps(v), 2 * lo, 2 * hi);

    Avx512F32: f32, __m512, 16 lanes of Avx512, tiles of 8 rows, half Avx2F32;
    zero _mm512_setzero_ps, load _mm512_loadu_ps, store _mm512_storeu_ps, splat _mm512_set1_ps,
    mul_add _mm512_fmadd_ps, add _mm512_add_ps, mul _mm512_mul_ps, div _mm512_div_ps,
    sqrt _mm512_sqrt_ps, min _mm512_min_ps, max _mm512_max_ps;
    equal(a, b) u32::from(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b));
    where_less(yes, no) _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes),
    where_equal _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b), no, yes);
    load_lanes(p, lo, hi) _mm512_maskz_loadu_ps(bits(lo, hi) as __mmask16, p);
    store_lanes(p, v) _mm512_mask_storeu_ps(p, bits(lo, hi) as __mmask16, v);

    Avx512F64: f64, __m512d, 8 lanes of Avx512, tiles of 8 rows, half Avx2F64;
    zero _mm512_setzero_pd, load _mm512_loadu_pd, store _mm512_storeu_pd, splat _mm512_set1_pd,
    mul_add _mm512_fmadd_pd, add _mm512_add_pd, mul _mm512_mul_pd, div _mm512_div_pd,
    sqrt _mm512_sqrt_pd, min _mm512_min_pd, max _mm512_max_pd;
    equal(a, b) u32::from(_mm512_cmp_pd_mask::<_CMP_EQ_OQ>(a, b));
    where_less(yes, no) _mm512_mask_blend_pd(_mm512_cmp_pd_mask::<_CMP_LT_OQ>(a, b), no, yes),
    where_equal _mm512_mask_blend_pd(_mm512_cmp_pd_mask::<_CMP_EQ_OQ>(a, b), no, yes);
    load_lanes(p, lo, hi) _mm512_maskz_loadu_pd(bits(lo, hi) as __mmask8, p);
    store_lanes(p, v) _mm512_mask_storeu_pd(p, bits(lo, hi) as __mmask8, v);
}

/// Bits `lo..hi`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn bits(lo: usize, hi: usize) -> u32 {
    (1 << hi) - (1 << lo)
}

/// [`Simd::load_lanes`] without masks.
#[inline(always)]
unsafe fn load_each<S: Simd, const W: usize>(p: *const S::T, lo: usize, hi: usize) -> S::V {
    let mut lanes = [S::T::default(); W];
    for (i, lane) in lanes.iter_mut().enumerate().take(hi).skip(lo) {
        // SAFETY: lanes lo..hi are valid by contract.
        *lane = unsafe { *p.wrapping_add(i) };
    }
    // SAFETY: `lanes` has W elements.
    unsafe { S::load(lanes.as_ptr()) }
}

/// [`Simd::store_lanes`] without masks.
#[inline(always)]
unsafe fn store_each<S: Simd, const W: usize>(p: *mut S::T, v: S::V, lo: usize, hi: usize) {
    let mut lanes = [S::T::default(); W];
    // SAFETY: `lanes` has W elements.
    unsafe { S::store(lanes.as_mut_ptr(), v) };
    for (i, lane) in lanes.iter().enumerate().take(hi).skip(lo) {
        // SAFETY: lanes lo..hi are valid by contract.
        unsafe { *p.wrapping_add(i) = *lane };
    }
}

/// A real type that statistics are kept in, with its registers.
pub trait Real:
    Copy + Send + Sync + Default + PartialOrd + Into<f64> + std::ops::AddAssign + Zero + 'static
{
    type Portable: Simd<T = Self>;
    type Avx2: Simd<T = Self>;
    type Avx512: Simd<T = Self>;
    /// Convert a gradient element to the nearest value.
    fn widen<E: Element>(e: E) -> Self;
    /// [`Real::widen`] of neighbors.
    fn widen_all<E: Element, S: Simd>(simd: S, e: [E; PADDING]) -> [Self; PADDING];
    /// Whether the value is neither infinite nor NaN.
    fn finite(self) -> bool;
}

macro_rules! real {
    ($t:ty, $widen:ident, $widen_all:ident, $portable:ty, $neon:ty, $avx2:ty, $avx512:ty) => {
        impl Real for $t {
            #[cfg(not(target_arch = "aarch64"))]
            type Portable = $portable;
            #[cfg(target_arch = "aarch64")]
            type Portable = $neon;
            #[cfg(target_arch = "x86_64")]
            type Avx2 = $avx2;
            #[cfg(target_arch = "x86_64")]
            type Avx512 = $avx512;
            #[cfg(not(target_arch = "x86_64"))]
            type Avx2 = Self::Portable;
            #[cfg(not(target_arch = "x86_64"))]
            type Avx512 = Self::Portable;
            #[inline(always)]
            fn widen<E: Element>(e: E) -> Self {
                e.$widen()
            }
            #[inline(always)]
            fn widen_all<E: Element, S: Simd>(simd: S, e: [E; PADDING]) -> [Self; PADDING] {
                E::$widen_all(simd, e)
            }
            #[inline(always)]
            fn finite(self) -> bool {
                // Two integer operations, which vectorize; `is_finite` compares.
                self.to_bits() & <$t>::INFINITY.to_bits() != <$t>::INFINITY.to_bits()
            }
        }
    };
}
real!(f32, to_f32, to_f32s, plain::PortableF32, neon::NeonF32, Avx2F32, Avx512F32);
real!(f64, to_f64, to_f64s, plain::PortableF64, neon::NeonF64, Avx2F64, Avx512F64);

/// A computation written once for every instruction set; `run` must be `#[inline(always)]`.
pub(crate) trait Kernel<T: Real> {
    type Output;
    fn run<S: Simd<T = T>>(self, simd: S) -> Self::Output;
}

/// Run a kernel with an instruction set of this processor, of which `isa` is the proof.
///
/// Each kernel is compiled once for each instruction set, and never into its caller.
pub(crate) fn dispatch<T: Real, K: Kernel<T>>(isa: Isa, kernel: K) -> K::Output {
    #[inline(never)]
    fn portable<T: Real, K: Kernel<T>>(kernel: K) -> K::Output {
        // SAFETY: every processor has the portable set.
        kernel.run(unsafe { T::Portable::new() })
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<T: Real, K: Kernel<T>>(kernel: K) -> K::Output {
            // SAFETY: this function runs only where the processor has the set.
            kernel.run(unsafe { T::Avx2::new() })
        }
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c,avx512f")]
        fn avx512<T: Real, K: Kernel<T>>(kernel: K) -> K::Output {
            // SAFETY: as above.
            kernel.run(unsafe { T::Avx512::new() })
        }
        match isa.set() {
            Set::Portable => portable(kernel),
            // SAFETY: the processor has the instruction set: `isa` is the proof.
            Set::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: as above.
            Set::Avx512 => unsafe { avx512(kernel) },
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        portable(kernel)
    }
}

/// Elements that rows of panels and matrices are padded to: the widest vector of any instruction set.
pub(crate) const PADDING: usize = 16;

/// Rows that are a multiple of this many elements apart share a few places of a first-level cache.
const CROWDED: usize = 128;

/// Round up to whole vectors, and so that a column of rows that are as far apart fits a first-level cache.
pub(crate) const fn padded(len: usize) -> usize {
    let whole = len.next_multiple_of(PADDING);
    if whole > 0 && whole.is_multiple_of(CROWDED) {
        whole + PADDING
    } else {
        whole
    }
}

/// Request the cache line at `p`; never faults.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch affects only the cache, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

#[cfg(test)]
mod tests;
