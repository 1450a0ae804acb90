use super::*;
use crate::compensate::compensate;
use crate::statistics::{Packed, Statistics};
use crate::testing::{random, random_f32, random_statistics};
use crate::Layout;

#[test]
fn no_exchange_is_left_that_compensation_would_prefer() {
    for (width, inner, block, m, struck) in [
        (16, 1, 16, 4, 0),
        (6, 3, 10, 4, 0),
        (12, 2, 24, 8, 7),
        (9, 1, 5, 2, 3),
        (7, 1, 64, 4, 0),
        // Enough exchanges that columns are subtracted from the matrix on the way.
        (48, 1, 96, 8, 5),
    ] {
        let groups = Groups::new((2, width, inner), m).expect("groups");
        let layout = Layout::new(2 * width * inner, block).expect("layout");
        let samples = 40;
        let packed = random_statistics(5, layout, samples);
        let mut weights = random_f32(6, layout.len());
        let there: Vec<bool> = (0..layout.len()).map(|j| struck == 0 || j % struck > 0).collect();
        weights.iter_mut().zip(&there).filter(|(_, t)| !**t).for_each(|(w, _)| *w = 0.0);
        let packed = Packed::F64(&packed);
        let statistics = Statistics::new(layout, packed, samples as f64, Some(&there));
        let damped = statistics.expect("statistics").damped(1e-2).expect("damped");
        let cost = |kept: &[bool]| -> f64 {
            let mut moved = weights.clone();
            let report = compensate(damped, &mut moved, kept).expect("compensate");
            report.increase.iter().sum()
        };
        let half = random(7, layout.len());
        let start: Vec<bool> = half.iter().zip(&there).map(|(x, t)| *t && *x > 0.0).collect();
        let mut kept = start.clone();
        refine(damped, &weights, groups, &mut kept).expect("refine");
        let least = cost(&kept);
        assert!(least <= cost(&start) && (kept != start || m == 2), "width {width}");
        assert_eq!(kept.iter().filter(|k| **k).count(), start.iter().filter(|k| **k).count());
        assert!(kept.iter().zip(&there).all(|(kept, there)| *there || !kept));
        for i in 0..layout.len() {
            for j in groups.later(i).filter(|j| i / block == *j / block) {
                if there[i] && there[j] && kept[i] != kept[j] {
                    let mut other = kept.clone();
                    other.swap(i, j);
                    assert!(cost(&other) >= least * (1.0 - 1e-9), "{i} {j}");
                }
            }
        }
    }
}

#[test]
fn blocks_that_cannot_be_factored_stay_as_they_are() {
    let layout = Layout::new(8, 8).expect("layout");
    let fine = vec![0.0f64; layout.packed_len()];
    let mut bad = fine.clone();
    bad[0] = -1e3;
    let of = |packed| {
        let statistics = Statistics::new(layout, Packed::F64(packed), 1.0, None);
        statistics.expect("statistics").damped(1.0).expect("damped")
    };
    let groups = Groups::new((1, 8, 1), 4).expect("groups");
    let mut kept = [true, false, true, false, true, false, true, false];
    let (before, weights) = (kept, [1.0, 9.0, 1.0, 9.0, 1.0, 9.0, 1.0, 9.0]);
    refine(of(&bad), &weights, groups, &mut kept).expect("refine");
    assert_eq!(kept, before);
    refine(of(&fine), &weights, groups, &mut kept).expect("refine");
    assert_eq!(kept, before.map(|k| !k));
    assert!(refine(of(&fine), &weights[1..], groups, &mut kept).is_err());
    let narrow = Groups::new((1, 7, 1), 4).expect("groups");
    assert!(refine(of(&fine), &weights, narrow, &mut kept).is_err());
}
