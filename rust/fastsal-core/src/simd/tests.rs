use super::*;

/// Read and write every range of lanes at the ends of an array of just these lanes.
struct Ranges;

impl<T: Real> Kernel<T> for Ranges {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = T>>(self, _simd: S) {
        let number = |i: usize| T::widen(i as f32 + 1.0);
        for (lo, hi) in (0..=S::W).flat_map(|lo| (lo..=S::W).map(move |hi| (lo, hi))) {
            // Memory without a neighbor: other accesses are found by AddressSanitizer.
            let from: Vec<T> = (lo..hi).map(number).collect();
            let mut to = vec![T::default(); hi - lo];
            let mut all = vec![number(99); S::W];
            // SAFETY: the lanes lo..hi from these pointers on are those of the arrays; `_simd` is the
            // proof of the instruction set.
            unsafe {
                let v = S::load_lanes(from.as_ptr().wrapping_sub(lo), lo, hi);
                S::store(all.as_mut_ptr(), v);
                let whole: Vec<T> = (0..S::W).map(number).collect();
                let v = S::load(whole.as_ptr());
                S::store_lanes(to.as_mut_ptr().wrapping_sub(lo), v, lo, hi);
            }
            assert!(to == from, "{lo}..{hi}");
            for (i, x) in all.into_iter().enumerate() {
                let wanted = if (lo..hi).contains(&i) { number(i) } else { T::default() };
                assert!(x == wanted, "{lo}..{hi}");
            }
        }
    }
}

#[test]
fn only_the_lanes_of_a_range_are_touched() {
    for isa in Isa::available() {
        dispatch::<f32, _>(isa, Ranges);
        dispatch::<f64, _>(isa, Ranges);
    }
}
