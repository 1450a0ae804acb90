use super::*;
use crate::rows::Rows;
use crate::testing::{random, random_f32, relative_error};
use half::{bf16, f16};

/// `GᵀG` of one block, one product at a time.
fn slow(rows: &[f64], n: usize, d: usize, layout: Layout) -> Vec<f64> {
    let mut packed = Vec::new();
    for b in 0..layout.blocks() {
        let (start, size) = (layout.range(b).start, layout.size(b));
        for i in 0..size {
            for j in i..size {
                let at = |r: usize, c: usize| rows[r * d + start + c];
                packed.push((0..n).map(|r| at(r, i) * at(r, j)).sum());
            }
        }
    }
    packed
}

/// A precision of the sums.
trait Precision: Copy + Default + Into<f64> + PartialEq {
    const NAN: Self;
    fn sums<'a>(packed: &'a mut [Self], sums: &'a mut [Self]) -> Sums<'a>;
}

impl Precision for f32 {
    const NAN: Self = f32::NAN;
    fn sums<'a>(packed: &'a mut [Self], sums: &'a mut [Self]) -> Sums<'a> {
        Sums::F32 { packed, sums }
    }
}

impl Precision for f64 {
    const NAN: Self = f64::NAN;
    fn sums<'a>(packed: &'a mut [Self], sums: &'a mut [Self]) -> Sums<'a> {
        Sums::F64 { packed, sums }
    }
}

fn check<E: Element, T: Precision>(to: impl Fn(f64) -> E, tolerance: f64)
where
    for<'a> Rows<'a, E>: Into<AnyRows<'a>>,
{
    for isa in Isa::available() {
        for (n, d, block) in [
            (1, 1, 1),
            (3, 5, 2),
            (64, 130, 64),
            (70, 300, 128),
            (5, 40, 17),
            (130, 33, 100),
            (9, 2100, 64),
            (2, 600, 512),
        ] {
            let (layout, stride) = (Layout::new(d, block).expect("layout"), d + 3);
            let data: Vec<E> = random(n as u64, n * stride).into_iter().map(&to).collect();
            let exact: Vec<f64> =
                (0..n * d).map(|i| data[i / d * stride + i % d].to_f64()).collect();
            let rows: AnyRows<'_> = Rows::new(&data, n, d, stride).expect("rows").into();
            // The contents of fresh memory are not read.
            let mut packed = vec![T::NAN; layout.packed_len()];
            let mut sums = vec![T::default(); d];
            for fresh in [true, false] {
                let to = T::sums(&mut packed, &mut sums);
                accumulate(isa, layout, rows, to, fresh).expect("accumulate");
            }
            let twice = |x: &f64| 2.0 * x;
            let expected: Vec<f64> = slow(&exact, n, d, layout).iter().map(twice).collect();
            assert!(relative_error(&packed, &expected) < tolerance, "{isa:?} {n} {d} {block}");
            let expected: Vec<f64> =
                (0..d).map(|c| 2.0 * (0..n).map(|r| exact[r * d + c]).sum::<f64>()).collect();
            assert!(relative_error(&sums, &expected) < tolerance, "sums {isa:?} {n} {d} {block}");
        }
    }
}

#[test]
fn equals_the_slow_sum() {
    check::<f64, f64>(|x| x, 1e-14);
    check::<f64, f32>(|x| x, 1e-6);
    check::<f32, f64>(|x| x as f32, 1e-14);
    check::<f32, f32>(|x| x as f32, 1e-6);
    check::<bf16, f32>(bf16::from_f64, 1e-6);
    check::<bf16, f64>(bf16::from_f64, 1e-14);
    check::<f16, f32>(f16::from_f64, 1e-6);
    check::<f16, f64>(f16::from_f64, 1e-14);
}

#[test]
fn does_not_depend_on_threads() {
    let (n, d) = (100, 10_000);
    let data = random_f32(1, n * d);
    let layout = Layout::new(d, 64).expect("layout");
    let statistics = |threads| {
        let (mut packed, mut sums) = (vec![0f32; layout.packed_len()], vec![0f32; d]);
        let rows = Rows::new(&data, n, d, d).expect("rows").into();
        parallel::set_threads(threads);
        let to = Sums::F32 { packed: &mut packed, sums: &mut sums };
        accumulate(Isa::best(), layout, rows, to, false).expect("accumulate");
        parallel::set_threads(0);
        (packed, sums)
    };
    assert!(statistics(1) == statistics(7));
}

#[test]
fn names_the_first_non_finite_gradient() {
    let (n, d) = (6, 40_000);
    let mut data = vec![1f32; n * d];
    data[3 * d + 39_999] = f32::NAN;
    data[4 * d] = f32::INFINITY;
    let rows = Rows::new(&data, n, d, d).expect("rows").into();
    let layout = Layout::new(d, 64).expect("layout");
    let (mut packed, mut sums) = (vec![0f32; layout.packed_len()], vec![0f32; d]);
    let to = Sums::F32 { packed: &mut packed, sums: &mut sums };
    for result in [check_finite(rows), accumulate(Isa::best(), layout, rows, to, false)] {
        match result {
            Err(Error::NonFiniteGradient { row: 3, column: 39_999, value }) => {
                assert!(value.is_nan());
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn names_the_first_square_that_overflows() {
    let (n, d) = (200, 3000);
    let layout = Layout::new(d, 64).expect("layout");
    for (large, at) in [(3e19f32, 2100), (-1.5e18, 70)] {
        let mut data = vec![1f32; n * d];
        // One square that is too large, or many whose sum is.
        for r in 0..n {
            data[r * d + at] = if large > 0.0 && r != 150 { 2.0 } else { large };
        }
        data[9 * d + at] *= 1.001;
        let rows = Rows::new(&data, n, d, d).expect("rows").into();
        for fresh in [true, false] {
            let (mut packed, mut sums) = (vec![0f32; layout.packed_len()], vec![3f32; d]);
            let to = Sums::F32 { packed: &mut packed, sums: &mut sums };
            match accumulate(Isa::best(), layout, rows, to, fresh) {
                Err(Error::Overflow { row, column, value }) => {
                    let expected = if large > 0.0 { 150 } else { 9 };
                    assert_eq!((row, column, value), (expected, at, data[row * d + at].into()));
                }
                other => panic!("{other:?}"),
            }
            assert!(!fresh || sums.iter().all(|s| *s == 3.0));
            let (mut packed, mut sums) = (vec![0f64; layout.packed_len()], vec![3f64; d]);
            let to = Sums::F64 { packed: &mut packed, sums: &mut sums };
            assert_eq!(accumulate(Isa::best(), layout, rows, to, fresh), Ok(()));
        }
    }
    // Larger than the type of the sums itself.
    let data = vec![1e300; 4];
    let rows = Rows::new(&data, 2, 2, 2).expect("rows").into();
    let (mut packed, mut sums) = (vec![0f32; 3], vec![0f32; 2]);
    let to = Sums::F32 { packed: &mut packed, sums: &mut sums };
    let result = accumulate(Isa::best(), Layout::new(2, 2).expect("layout"), rows, to, true);
    assert!(matches!(result, Err(Error::Overflow { row: _, column: 0, .. })), "{result:?}");
}
