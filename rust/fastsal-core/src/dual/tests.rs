use super::*;
use crate::rows::Rows;
use crate::statistics::{Packed, Statistics};
use crate::testing::{random, random_statistics};

#[test]
fn equals_the_primal() {
    for (n, len, block) in [(1, 5, 5), (3, 200, 64), (20, 300, 150), (40, 3000, 1500), (70, 9, 9)] {
        let layout = Layout::new(len, block).expect("layout");
        let data = random(n as u64, n * len);
        let rows: AnyRows<'_> = Rows::new(&data, n, len, len).expect("rows").into();
        let (packed, n) = (random_statistics(n as u64, layout, n), n as f64);
        let kept: Vec<bool> = (0..len).map(|i| i % 4 != 2).collect();
        for kept in [None, Some(kept.as_slice())] {
            let primal =
                Statistics::new(layout, Packed::F64(&packed), n, kept).expect("statistics");
            for damping in [1e-4, 1.0] {
                let (mut found, mut expected) = (vec![0.0; len], vec![0.0; len]);
                inverse_diagonal(layout, rows, n, kept, damping, &mut found).expect("dual");
                let damped = primal.damped(damping).expect("damped");
                crate::inverse::inverse_diagonal(damped, &mut expected).expect("primal");
                for (f, e) in found.iter().zip(&expected) {
                    assert!((f / e - 1.0).abs() < 1e-9, "{n} {len} {block} {f} {e}");
                }
            }
        }
    }
}
