use super::*;
use crate::layout::row_base;
use crate::syrk::syrk_of_lower;
use crate::testing::random;

const SIZES: [usize; 12] = [1, 2, 6, 13, 33, 125, 126, 127, 140, 256, 261, 300];

/// `A = GᵀG + I`, upper triangle by rows, `padded(size)` apart; NaN below the diagonal.
fn matrix(size: usize) -> Vec<f64> {
    let g = random(size as u64, 8 * size);
    let mut a = vec![f64::NAN; size * padded(size)];
    for i in 0..size {
        for j in i..size {
            let sum: f64 = (0..8).map(|k| g[k * size + i] * g[k * size + j]).sum();
            a[i * padded(size) + j] = sum + f64::from(u8::from(i == j));
        }
    }
    a
}

fn panels(workers: usize) -> Panels {
    Panels { workers, ..Panels::default() }
}

/// The upper triangles of both, by rows `stride` apart, differ by rounding alone.
fn assert_close(got: &[f64], want: &[f64], size: usize, rows: usize, stride: usize) {
    for i in 0..rows {
        for j in i..size {
            let (x, y) = (got[i * stride + j], want[i * stride + j]);
            assert!((x - y).abs() <= 1e-11 * (1.0 + y.abs()), "{size} ({i}, {j}): {x} {y}");
        }
    }
}

#[test]
fn factors_by_panels_are_those_by_rows() {
    for isa in Isa::available() {
        for size in SIZES {
            for rows in [size, size / 2, size.saturating_sub(3)] {
                let (mut want, mut got) = (matrix(size), matrix(size));
                assert!(cholesky::factor(isa, &mut want, size, rows, padded(size)));
                assert!(cholesky_rows(isa, &mut got, size, rows, &mut panels(1)));
                assert_close(&got, &want, size, rows, padded(size));
                // The rest is as it was.
                let from = rows * padded(size);
                let before = matrix(size);
                let mut rest = got[from..].iter().zip(&before[from..]);
                assert!(rest.all(|(x, y)| x.to_bits() == y.to_bits()));
            }
        }
    }
}

#[test]
fn inverses_by_panels_are_the_inverse() {
    for isa in Isa::available() {
        for size in SIZES {
            let stride = padded(size);
            let mut panels = panels(1);
            let mut u = matrix(size);
            assert!(cholesky_rows(isa, &mut u, size, size, &mut panels));
            let mut m = vec![f64::NAN; u.len()];
            invert_factor(isa, &u, &mut m, size, stride, &mut panels);
            for i in 0..size {
                assert!(m[i * stride + i + 1..(i + 1) * stride].iter().all(|x| *x == 0.0));
                for j in i..size {
                    // M = U⁻ᵀ: the rows of M times the columns of Uᵀ.
                    let product = |k: usize| m[j * stride + k] * u[i * stride + k];
                    let sum: f64 = (i..=j).map(product).sum();
                    assert!((sum - f64::from(u8::from(i == j))).abs() < 1e-10, "{isa:?} {size}");
                }
            }
            let (mut got, mut want) = (vec![f64::NAN; triangle(size)], vec![0.0; triangle(size)]);
            let mut memory = Aligned::default();
            memory.room(columns_len(size)).fill(f64::NAN);
            square_of_lower(isa, &m, size, &mut memory, &mut got, &mut panels);
            syrk_of_lower(isa, &m, size, &mut want);
            for i in 0..size {
                for j in i..size {
                    let (x, y) = (got[row_base(size, i) + j], want[row_base(size, i) + j]);
                    assert!((x - y).abs() <= 1e-11, "{isa:?} {size} ({i}, {j}): {x} {y}");
                }
            }
        }
    }
}

#[test]
fn threads_that_share_a_matrix_change_no_bit() {
    let size = 420;
    for isa in Isa::available() {
        let mut found: Vec<Vec<u64>> = Vec::new();
        for workers in [1, 2, 3, 7, 40] {
            let (mut u, mut panels) = (matrix(size), panels(workers));
            assert!(cholesky_rows(isa, &mut u, size, size, &mut panels));
            let (mut m, mut packed) = (vec![0.0; u.len()], vec![0.0; triangle(size)]);
            invert_factor(isa, &u, &mut m, size, padded(size), &mut panels);
            let memory = &mut Aligned::default();
            square_of_lower(isa, &m, size, memory, &mut packed, &mut panels);
            let upper = (0..size).flat_map(|i| &u[i * padded(size) + i..i * padded(size) + size]);
            let all = upper.chain(&m).chain(&packed);
            found.push(all.map(|x| x.to_bits()).collect());
        }
        assert!(found.iter().all(|bits| *bits == found[0]), "{isa:?}");
    }
}

#[test]
fn what_is_not_positive_definite_is_refused() {
    let size = 300;
    for isa in Isa::available() {
        for (at, bad) in [(0, -1.0), (130, 0.0), (299, f64::NAN)] {
            let mut a = matrix(size);
            a[at * padded(size) + at] = bad;
            assert!(!cholesky_rows(isa, &mut a, size, size, &mut panels(2)));
        }
    }
}
