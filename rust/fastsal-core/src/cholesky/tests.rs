use super::*;
use crate::testing::random;

/// `A = GᵀG + I`, upper triangle by rows, `padded(size)` apart.
fn matrix(size: usize) -> Vec<f64> {
    let g = random(size as u64, size * size);
    let mut a = vec![0.0; size * padded(size)];
    for i in 0..size {
        for j in i..size {
            let sum: f64 = (0..size).map(|k| g[k * size + i] * g[k * size + j]).sum();
            a[i * padded(size) + j] = sum + f64::from(u8::from(i == j));
        }
    }
    a
}

#[test]
fn the_factor_and_its_inverse_give_the_matrix_and_one() {
    for isa in Isa::available() {
        for size in [1, 2, 3, 4, 5, 8, 11, 16, 17, 23] {
            let (a, stride) = (matrix(size), padded(size));
            let (mut u, mut m) = (a.clone(), vec![f64::NAN; a.len()]);
            let panels = &mut Panels::default();
            assert!(cholesky(isa, &mut u, size, panels));
            invert_factor(isa, &u, &mut m, size, stride, panels);
            let mut x: Vec<f64> = (0..size).map(|i| i as f64).collect();
            solve(&u, size, &mut x);
            for i in 0..size {
                for j in i..size {
                    let product = |k: usize| u[k * stride + i] * u[k * stride + j];
                    let sum: f64 = (0..=i).map(product).sum();
                    assert!((sum - a[i * stride + j]).abs() < 1e-10, "{isa:?} {size}");
                    // M = U⁻ᵀ: the rows of M times the columns of Uᵀ.
                    let product = |k: usize| m[j * stride + k] * u[i * stride + k];
                    let sum: f64 = (i..=j).map(product).sum();
                    assert!((sum - f64::from(u8::from(i == j))).abs() < 1e-10, "{isa:?} {size}");
                }
                let row = (0..size).map(|j| a[i.min(j) * stride + i.max(j)] * x[j]);
                assert!((row.sum::<f64>() - i as f64).abs() < 1e-8, "{isa:?} {size}");
            }
        }
    }
}

#[test]
fn what_is_not_positive_definite_is_refused() {
    for isa in Isa::available() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let mut a = matrix(7);
            a[6 * padded(7) + 6] = bad;
            assert!(!cholesky(isa, &mut a, 7, &mut Panels::default()));
        }
    }
}
