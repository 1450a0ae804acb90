//! Vector instructions behind one small trait, chosen when the program runs.
//!
//! A kernel is written once, generic over [`Simd`], as an `#[inline(always)]` function; a thin
//! wrapper with `#[target_feature]` instantiates it for each instruction set. On arm64 NEON is part
//! of the baseline, so the portable lanes compile to it.

use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::rows::Element;

/// Instruction set of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust; SSE2 on x86-64, NEON on arm64.
    Portable,
    /// 256-bit vectors and fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

impl Isa {
    /// The best of what this processor has.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }

    /// All that this processor has, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                found.push(Self::Avx512);
            }
        }
        found
    }

    /// # Errors
    /// [`Error::Value`] when this processor lacks the instruction set.
    pub fn check(self) -> Result<()> {
        if self == Self::best() || Self::available().contains(&self) {
            return Ok(());
        }
        let got = self.name().to_owned();
        Err(Error::Value { what: "isa", got, expected: "one that this processor has" })
    }

    /// Its common name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable if cfg!(target_arch = "aarch64") => "neon",
            Self::Portable => "portable",
            Self::Avx2 => "avx2+fma",
            Self::Avx512 => "avx512f",
        }
    }
}

/// `W` lanes of one real type. Every function reads or writes `W` lanes from its pointer.
///
/// # Safety
/// Callers run the functions only on a processor that has the instruction set, on pointers that are
/// valid for `W` elements (for the elements in `lo..hi`, where a range is given).
pub trait Simd: Copy {
    /// Element type.
    type T: Copy;
    /// Register.
    type V: Copy;
    /// What the registers belong to.
    const ISA: Isa;
    /// Lanes of a register.
    const W: usize;
    /// Rows of a register tile.
    const ROWS: usize;
    /// Registers of half the lanes, where those cost less; else the same.
    type Half: Simd<T = Self::T>;
    /// Whether `Half` is a half.
    const HALVES: bool = Self::Half::W < Self::W;

    unsafe fn zero() -> Self::V;
    unsafe fn load(p: *const Self::T) -> Self::V;
    unsafe fn splat(p: *const Self::T) -> Self::V;
    /// `a * b + c`
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller one; `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The larger one; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Bit `i` says whether lane `i` is the same in both.
    unsafe fn equal(a: Self::V, b: Self::V) -> u32;
    unsafe fn store(p: *mut Self::T, v: Self::V);
    /// Lanes `lo..hi`; the others are zero.
    unsafe fn load_lanes(p: *const Self::T, lo: usize, hi: usize) -> Self::V;
    /// Lanes `lo..hi`; the others are left alone.
    unsafe fn store_lanes(p: *mut Self::T, v: Self::V, lo: usize, hi: usize);
}

macro_rules! portable {
    ($name:ident, $t:ty, $w:literal) => {
        #[derive(Clone, Copy)]
        pub struct $name;
        // SAFETY (of the unsafe blocks below): the trait's contract makes the pointers valid.
        impl Simd for $name {
            type T = $t;
            type V = [$t; $w];
            const ISA: Isa = Isa::Portable;
            const W: usize = $w;
            const ROWS: usize = 4;
            type Half = Self;
            #[inline(always)]
            unsafe fn zero() -> Self::V {
                [0.0; $w]
            }
            #[inline(always)]
            unsafe fn load(p: *const $t) -> Self::V {
                // SAFETY: valid for W elements by contract.
                unsafe { std::ptr::read_unaligned(p.cast()) }
            }
            #[inline(always)]
            unsafe fn splat(p: *const $t) -> Self::V {
                // SAFETY: valid by contract.
                [unsafe { *p }; $w]
            }
            #[inline(always)]
            unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                std::array::from_fn(|i| {
                    // Without an instruction for it, a fused product is a slow library call.
                    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                        a[i].mul_add(b[i], c[i])
                    } else {
                        a[i] * b[i] + c[i]
                    }
                })
            }
            #[inline(always)]
            unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|i| a[i] + b[i])
            }
            #[inline(always)]
            unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|i| a[i] * b[i])
            }
            #[inline(always)]
            unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|i| a[i] / b[i])
            }
            #[inline(always)]
            unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
            }
            #[inline(always)]
            unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
            }
            #[inline(always)]
            unsafe fn equal(a: Self::V, b: Self::V) -> u32 {
                (0..$w).fold(0, |bits, i| bits | u32::from(a[i] == b[i]) << i)
            }
            #[inline(always)]
            unsafe fn store(p: *mut $t, v: Self::V) {
                // SAFETY: valid for W elements by contract.
                unsafe { std::ptr::write_unaligned(p.cast(), v) }
            }
            #[inline(always)]
            unsafe fn load_lanes(p: *const $t, lo: usize, hi: usize) -> Self::V {
                let mut v = [0.0; $w];
                for (i, lane) in v.iter_mut().enumerate().take(hi).skip(lo) {
                    // SAFETY: lanes lo..hi are valid by contract.
                    *lane = unsafe { *p.wrapping_add(i) };
                }
                v
            }
            #[inline(always)]
            unsafe fn store_lanes(p: *mut $t, v: Self::V, lo: usize, hi: usize) {
                for (i, lane) in v.iter().enumerate().take(hi).skip(lo) {
                    // SAFETY: lanes lo..hi are valid by contract.
                    unsafe { *p.wrapping_add(i) = *lane };
                }
            }
        }
    };
}
portable!(PortableF32, f32, 4);
portable!(PortableF64, f64, 2);

#[cfg(target_arch = "x86_64")]
pub use x86::*;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, Simd};
    use std::arch::x86_64::*;

    macro_rules! avx2 {
        ($name:ident, $t:ty, $v:ty, $w:literal, $zero:ident, $load:ident, $splat:ident, $fma:ident, $add:ident, $mul:ident, $div:ident, $min:ident, $max:ident, $store:ident, $equal:ident, $mask:ident) => {
            #[derive(Clone, Copy)]
            pub struct $name;
            impl Simd for $name {
                type T = $t;
                type V = $v;
                const ISA: Isa = Isa::Avx2;
                const W: usize = $w;
                const ROWS: usize = 6;
                type Half = Self;
                #[inline(always)]
                unsafe fn zero() -> $v {
                    // SAFETY: the processor has AVX2 by contract.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn load(p: *const $t) -> $v {
                    // SAFETY: AVX2 and a valid pointer by contract.
                    unsafe { $load(p) }
                }
                #[inline(always)]
                unsafe fn splat(p: *const $t) -> $v {
                    // SAFETY: AVX2 and a valid pointer by contract.
                    unsafe { $splat(*p) }
                }
                #[inline(always)]
                unsafe fn mul_add(a: $v, b: $v, c: $v) -> $v {
                    // SAFETY: the processor has FMA by contract.
                    unsafe { $fma(a, b, c) }
                }
                #[inline(always)]
                unsafe fn add(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX2 by contract.
                    unsafe { $add(a, b) }
                }
                #[inline(always)]
                unsafe fn mul(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX2 by contract.
                    unsafe { $mul(a, b) }
                }
                #[inline(always)]
                unsafe fn div(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX2 by contract.
                    unsafe { $div(a, b) }
                }
                #[inline(always)]
                unsafe fn min(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX2 by contract.
                    unsafe { $min(a, b) }
                }
                #[inline(always)]
                unsafe fn max(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX2 by contract.
                    unsafe { $max(a, b) }
                }
                #[inline(always)]
                unsafe fn equal(a: $v, b: $v) -> u32 {
                    // SAFETY: the processor has AVX2 by contract.
                    unsafe { $mask($equal::<_CMP_EQ_OQ>(a, b)) as u32 }
                }
                #[inline(always)]
                unsafe fn store(p: *mut $t, v: $v) {
                    // SAFETY: AVX2 and a valid pointer by contract.
                    unsafe { $store(p, v) }
                }
                #[inline(always)]
                unsafe fn load_lanes(p: *const $t, lo: usize, hi: usize) -> $v {
                    let mut lanes = [0.0; $w];
                    for (i, lane) in lanes.iter_mut().enumerate().take(hi).skip(lo) {
                        // SAFETY: lanes lo..hi are valid by contract.
                        *lane = unsafe { *p.wrapping_add(i) };
                    }
                    // SAFETY: `lanes` has W elements.
                    unsafe { $load(lanes.as_ptr()) }
                }
                #[inline(always)]
                unsafe fn store_lanes(p: *mut $t, v: $v, lo: usize, hi: usize) {
                    let mut lanes = [0.0; $w];
                    // SAFETY: `lanes` has W elements.
                    unsafe { $store(lanes.as_mut_ptr(), v) };
                    for (i, lane) in lanes.iter().enumerate().take(hi).skip(lo) {
                        // SAFETY: lanes lo..hi are valid by contract.
                        unsafe { *p.wrapping_add(i) = *lane };
                    }
                }
            }
        };
    }
    avx2!(
        Avx2F32,
        f32,
        __m256,
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        _mm256_mul_ps,
        _mm256_div_ps,
        _mm256_min_ps,
        _mm256_max_ps,
        _mm256_storeu_ps,
        _mm256_cmp_ps,
        _mm256_movemask_ps
    );
    avx2!(
        Avx2F64,
        f64,
        __m256d,
        4,
        _mm256_setzero_pd,
        _mm256_loadu_pd,
        _mm256_set1_pd,
        _mm256_fmadd_pd,
        _mm256_add_pd,
        _mm256_mul_pd,
        _mm256_div_pd,
        _mm256_min_pd,
        _mm256_max_pd,
        _mm256_storeu_pd,
        _mm256_cmp_pd,
        _mm256_movemask_pd
    );

    macro_rules! avx512 {
        ($name:ident, $t:ty, $v:ty, $w:literal, $half:ty, $mask:ty, $zero:ident, $load:ident, $splat:ident, $fma:ident, $add:ident, $mul:ident, $div:ident, $min:ident, $max:ident, $store:ident, $mload:ident, $mstore:ident, $equal:ident) => {
            #[derive(Clone, Copy)]
            pub struct $name;
            impl Simd for $name {
                type T = $t;
                type V = $v;
                const ISA: Isa = Isa::Avx512;
                const W: usize = $w;
                const ROWS: usize = 8;
                type Half = $half;
                #[inline(always)]
                unsafe fn zero() -> $v {
                    // SAFETY: the processor has AVX-512F by contract.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn load(p: *const $t) -> $v {
                    // SAFETY: AVX-512F and a valid pointer by contract.
                    unsafe { $load(p) }
                }
                #[inline(always)]
                unsafe fn splat(p: *const $t) -> $v {
                    // SAFETY: AVX-512F and a valid pointer by contract.
                    unsafe { $splat(*p) }
                }
                #[inline(always)]
                unsafe fn mul_add(a: $v, b: $v, c: $v) -> $v {
                    // SAFETY: the processor has AVX-512F by contract.
                    unsafe { $fma(a, b, c) }
                }
                #[inline(always)]
                unsafe fn add(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX-512F by contract.
                    unsafe { $add(a, b) }
                }
                #[inline(always)]
                unsafe fn mul(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX-512F by contract.
                    unsafe { $mul(a, b) }
                }
                #[inline(always)]
                unsafe fn div(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX-512F by contract.
                    unsafe { $div(a, b) }
                }
                #[inline(always)]
                unsafe fn min(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX-512F by contract.
                    unsafe { $min(a, b) }
                }
                #[inline(always)]
                unsafe fn max(a: $v, b: $v) -> $v {
                    // SAFETY: the processor has AVX-512F by contract.
                    unsafe { $max(a, b) }
                }
                #[inline(always)]
                unsafe fn equal(a: $v, b: $v) -> u32 {
                    // SAFETY: the processor has AVX-512F by contract.
                    unsafe { u32::from($equal::<_CMP_EQ_OQ>(a, b)) }
                }
                #[inline(always)]
                unsafe fn store(p: *mut $t, v: $v) {
                    // SAFETY: AVX-512F and a valid pointer by contract.
                    unsafe { $store(p, v) }
                }
                #[inline(always)]
                unsafe fn load_lanes(p: *const $t, lo: usize, hi: usize) -> $v {
                    let lanes = ((1u32 << hi) - (1u32 << lo)) as $mask;
                    // SAFETY: masked lanes are not read.
                    unsafe { $mload(lanes, p) }
                }
                #[inline(always)]
                unsafe fn store_lanes(p: *mut $t, v: $v, lo: usize, hi: usize) {
                    let lanes = ((1u32 << hi) - (1u32 << lo)) as $mask;
                    // SAFETY: masked lanes are not written.
                    unsafe { $mstore(p, lanes, v) }
                }
            }
        };
    }
    avx512!(
        Avx512F32,
        f32,
        __m512,
        16,
        Avx2F32,
        __mmask16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps,
        _mm512_mul_ps,
        _mm512_div_ps,
        _mm512_min_ps,
        _mm512_max_ps,
        _mm512_storeu_ps,
        _mm512_maskz_loadu_ps,
        _mm512_mask_storeu_ps,
        _mm512_cmp_ps_mask
    );
    avx512!(
        Avx512F64,
        f64,
        __m512d,
        8,
        Avx2F64,
        __mmask8,
        _mm512_setzero_pd,
        _mm512_loadu_pd,
        _mm512_set1_pd,
        _mm512_fmadd_pd,
        _mm512_add_pd,
        _mm512_mul_pd,
        _mm512_div_pd,
        _mm512_min_pd,
        _mm512_max_pd,
        _mm512_storeu_pd,
        _mm512_maskz_loadu_pd,
        _mm512_mask_storeu_pd,
        _mm512_cmp_pd_mask
    );
}

/// A real type that statistics are kept in, with its registers.
pub trait Real:
    Copy + Send + Sync + Default + PartialOrd + Into<f64> + std::ops::AddAssign + 'static
{
    /// Half the distance from one to the next larger number.
    const UNIT_ROUNDOFF: f64;
    #[doc(hidden)]
    type Portable: Simd<T = Self>;
    #[doc(hidden)]
    type Avx2: Simd<T = Self>;
    #[doc(hidden)]
    type Avx512: Simd<T = Self>;
    /// Nearest value.
    fn from_f64(x: f64) -> Self;
    /// Nearest value of a gradient element.
    fn widen<E: Element>(e: E) -> Self;
    /// Whether the value is neither infinite nor NaN.
    fn finite(self) -> bool;
}

macro_rules! real {
    ($t:ty, $widen:ident, $portable:ty, $avx2:ty, $avx512:ty) => {
        impl Real for $t {
            const UNIT_ROUNDOFF: f64 = <$t>::EPSILON as f64 / 2.0;
            type Portable = $portable;
            #[cfg(target_arch = "x86_64")]
            type Avx2 = $avx2;
            #[cfg(target_arch = "x86_64")]
            type Avx512 = $avx512;
            #[cfg(not(target_arch = "x86_64"))]
            type Avx2 = $portable;
            #[cfg(not(target_arch = "x86_64"))]
            type Avx512 = $portable;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn widen<E: Element>(e: E) -> Self {
                e.$widen()
            }
            #[inline(always)]
            fn finite(self) -> bool {
                // Two integer operations, which vectorise; `is_finite` compares.
                self.to_bits() & <$t>::INFINITY.to_bits() != <$t>::INFINITY.to_bits()
            }
        }
    };
}
real!(f32, to_f32, PortableF32, Avx2F32, Avx512F32);
real!(f64, to_f64, PortableF64, Avx2F64, Avx512F64);

/// A computation written once for every instruction set; `run` must be `#[inline(always)]`.
pub(crate) trait Kernel<T: Real> {
    type Output;
    fn run<S: Simd<T = T>>(self) -> Self::Output;
}

/// Run a kernel with an instruction set that [`Isa::check`] or [`Isa::best`] found here.
///
/// Each kernel is compiled once for each instruction set, and never into its caller.
pub(crate) fn dispatch<T: Real, K: Kernel<T>>(isa: Isa, kernel: K) -> K::Output {
    #[inline(never)]
    fn portable<T: Real, K: Kernel<T>>(kernel: K) -> K::Output {
        kernel.run::<T::Portable>()
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma")]
        fn avx2<T: Real, K: Kernel<T>>(kernel: K) -> K::Output {
            kernel.run::<T::Avx2>()
        }
        #[inline(never)]
        #[target_feature(enable = "avx512f")]
        fn avx512<T: Real, K: Kernel<T>>(kernel: K) -> K::Output {
            kernel.run::<T::Avx512>()
        }
        match isa {
            Isa::Portable => portable(kernel),
            // SAFETY: the processor has the instruction set.
            Isa::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: as above.
            Isa::Avx512 => unsafe { avx512(kernel) },
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        portable(kernel)
    }
}

/// The widest vector of any instruction set, in elements: panels are padded to it.
pub(crate) const WIDEST: usize = 16;

/// Ask for the cache line at `p`; never faults.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect but on the cache, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
