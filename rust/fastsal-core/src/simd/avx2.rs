//! Some lanes of a vector of AVX2.

use std::arch::x86_64::*;

/// All bits of lanes `lo..hi` of eight.
#[inline(always)]
pub(crate) unsafe fn window(lo: usize, hi: usize) -> __m256i {
    // Ones in the middle of zeros: the vector at 8 - lo has ones from lane lo on, that at 16 - hi up
    // to lane hi.
    static ONES: [i32; 24] = {
        let mut ones = [0; 24];
        let mut i = 8;
        while i < 16 {
            ones[i] = -1;
            i += 1;
        }
        ones
    };
    debug_assert!(lo <= hi && hi <= 8);
    // SAFETY: the vectors lie in the array, as `lo <= hi <= 8`; AVX2 by contract.
    unsafe {
        let from = _mm256_loadu_si256(ONES.as_ptr().wrapping_add(8 - lo).cast());
        let to = _mm256_loadu_si256(ONES.as_ptr().wrapping_add(16 - hi).cast());
        _mm256_and_si256(from, to)
    }
}

/// Store lanes `lo..hi` of eight: two stores, which may overlap, or one. Masked stores of AVX2 take
/// tens of cycles on some processors.
#[inline(always)]
pub(crate) unsafe fn store_window(p: *mut f32, v: __m256, lo: usize, hi: usize) {
    static PLACES: [i32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7];
    debug_assert!(lo <= hi && hi <= 8);
    // SAFETY: the vectors of places lie in the array, as `lo <= hi <= 8`; each store is of lanes
    // within lo..hi, which are valid by contract, and so is AVX2.
    unsafe {
        // The vector whose first lane is lane `first`.
        let from = |first: usize| {
            let places = _mm256_loadu_si256(PLACES.as_ptr().wrapping_add(first).cast());
            _mm256_castps256_ps128(_mm256_permutevar8x32_ps(v, places))
        };
        match hi - lo {
            0 => {}
            1 => _mm_store_ss(p.wrapping_add(lo), from(lo)),
            2 | 3 => {
                _mm_storel_epi64(p.wrapping_add(lo).cast(), _mm_castps_si128(from(lo)));
                let last = _mm_castps_si128(from(hi - 2));
                _mm_storel_epi64(p.wrapping_add(hi - 2).cast(), last);
            }
            4..8 => {
                _mm_storeu_ps(p.wrapping_add(lo), from(lo));
                _mm_storeu_ps(p.wrapping_add(hi - 4), from(hi - 4));
            }
            _ => _mm256_storeu_ps(p, v),
        }
    }
}
