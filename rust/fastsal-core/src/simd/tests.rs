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

/// Choose between two vectors by comparisons, also with NaN and with zeros of both signs.
struct Choices;

impl<T: Real> Kernel<T> for Choices {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T = T>>(self, _simd: S) {
        let number = |x: f32| T::widen(x);
        let values = [f32::NAN, f32::NEG_INFINITY, -1.0, -0.0, 0.0, 2.0, f32::INFINITY];
        let (yes, no) = (number(1.0), number(0.0));
        for (x, y) in values.into_iter().flat_map(|x| values.map(|y| (x, y))) {
            let mut found = [vec![no; S::W], vec![no; S::W]];
            let (a, b) = (number(x), number(y));
            // SAFETY: all pointers are to a number or to a whole vector; `_simd` is the proof.
            let equal = unsafe {
                let (a, b) = (S::splat(&raw const a), S::splat(&raw const b));
                let (yes, no) = (S::splat(&raw const yes), S::splat(&raw const no));
                S::store(found[0].as_mut_ptr(), S::where_less(a, b, yes, no));
                S::store(found[1].as_mut_ptr(), S::where_equal(a, b, yes, no));
                S::equal(a, b)
            };
            for (found, wanted) in found.iter().zip([x < y, x == y]) {
                let wanted = if wanted { yes } else { no };
                assert!(found.iter().all(|lane| *lane == wanted), "{x} {y}");
            }
            assert_eq!(equal, if x == y { (1 << S::W) - 1 } else { 0 }, "{x} {y}");
        }
    }
}

#[test]
fn comparisons_are_those_of_numbers() {
    for isa in Isa::available() {
        dispatch::<f32, _>(isa, Choices);
        dispatch::<f64, _>(isa, Choices);
    }
}
