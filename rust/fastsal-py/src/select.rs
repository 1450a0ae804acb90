//! Thresholds and masks.

use fastsal_core::memory::zeros;
use fastsal_core::{keys, select};
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arrays::{slice, slices, to_numpy, Array};
use crate::parallel::call;

/// Masks of all arrays (true = kept) and the score of the last pruned weight.
type Cut<'py> = (Vec<Bound<'py, PyArray1<bool>>>, Option<f32>);

/// About how many nanoseconds it takes to select among scores.
fn passes(arrays: &[&[f32]]) -> u64 {
    arrays.iter().map(|scores| 2 * scores.len() as u64).sum()
}

/// The `k`-th smallest score over all arrays, `k >= 1`.
#[pyfunction]
pub fn kth_smallest<'py>(
    py: Python<'py>,
    scores: Vec<Array<'py, f32>>,
    k: usize,
) -> PyResult<Option<f32>> {
    let arrays = slices("scores", &scores)?;
    let found = call(py, passes(&arrays), || select::smallest(&arrays, k, &[]))?;
    Ok(found.1)
}

/// Prune the `k` smallest scores over all arrays; `floors` are the least kept counts, or empty.
#[pyfunction]
pub fn prune_smallest<'py>(
    py: Python<'py>,
    scores: Vec<Array<'py, f32>>,
    k: usize,
    floors: Vec<usize>,
) -> PyResult<Cut<'py>> {
    let arrays = slices("scores", &scores)?;
    let (masks, threshold) = call(py, passes(&arrays), || {
        let (cuts, threshold) = select::smallest(&arrays, k, &floors)?;
        let write = |(scores, cut): (&&[f32], _)| {
            let mut kept = zeros("masks", scores.len())?;
            select::write_mask(scores, cut, &mut kept).map(|()| kept)
        };
        let masks: fastsal_core::Result<Vec<_>> = arrays.iter().zip(cuts).map(write).collect();
        Ok((masks?, threshold))
    })?;
    Ok((masks.into_iter().map(|m| to_numpy(py, m)).collect(), threshold))
}

/// Counts of the halves of keys (see the core's `count_keys`), `[65536]`.
#[pyfunction]
#[pyo3(signature = (scores, upper=None, below=u64::MAX))]
pub fn count_keys<'py>(
    py: Python<'py>,
    scores: Array<'py, f32>,
    upper: Option<u32>,
    below: u64,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let scores = slice("scores", &scores)?;
    let counts = call(py, passes(&[scores]), || keys::count_keys(scores, upper, below))?;
    Ok(to_numpy(py, counts))
}

/// The mask (true = kept) of one array under a threshold: keys below `key` are pruned, and the first
/// `ties` of those equal to it.
#[pyfunction]
pub fn mask_below<'py>(
    py: Python<'py>,
    scores: Array<'py, f32>,
    key: u32,
    ties: usize,
) -> PyResult<Bound<'py, PyArray1<bool>>> {
    let scores = slice("scores", &scores)?;
    let kept = call(py, passes(&[scores]), || {
        let mut kept = zeros("masks", scores.len())?;
        let cut = select::threshold(scores, key, ties);
        select::write_mask(scores, cut, &mut kept).map(|()| kept)
    });
    kept.map(|kept| to_numpy(py, kept))
}

/// The score of a key.
#[pyfunction]
pub fn score_of_key(key: u32) -> f32 {
    keys::score(key)
}

/// Keep the `n` largest of every `m` scores along the middle axis of `[outer, width, inner]`.
#[pyfunction]
pub fn n_of_m<'py>(
    py: Python<'py>,
    scores: Array<'py, f32>,
    shape: (usize, usize, usize),
    n: usize,
    m: usize,
) -> PyResult<Bound<'py, PyArray1<bool>>> {
    let scores = slice("scores", &scores)?;
    let kept = call(py, 8 * passes(&[scores]), || {
        let mut kept = zeros("masks", scores.len())?;
        select::n_of_m(scores, shape, n, m, &mut kept).map(|()| kept)
    });
    kept.map(|kept| to_numpy(py, kept))
}
