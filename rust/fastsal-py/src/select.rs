//! Thresholds and masks.

use fastsal_core::{keys, select};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;

use crate::arrays::{numpy_zeros, slice, slice_mut, slices, to_numpy, Array};
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
    let masks: Vec<_> = arrays.iter().map(|a| numpy_zeros(py, a.len())).collect::<PyResult<_>>()?;
    let mut kept: Vec<_> = masks.iter().map(|mask| mask.readwrite()).collect();
    let kept =
        kept.iter_mut().map(|mask| slice_mut("masks", mask)).collect::<PyResult<Vec<_>>>()?;
    let threshold = call(py, passes(&arrays), || {
        let (cuts, threshold) = select::smallest(&arrays, k, &floors)?;
        for ((scores, cut), kept) in arrays.iter().zip(cuts).zip(kept) {
            select::write_mask(scores, cut, kept)?;
        }
        Ok(threshold)
    })?;
    Ok((masks, threshold))
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
    mask_of(py, scores, passes(&[scores]), |kept| {
        select::write_mask(scores, select::threshold(scores, key, ties), kept)
    })
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
    mask_of(py, scores, 8 * passes(&[scores]), |kept| select::n_of_m(scores, shape, n, m, kept))
}

/// Make a mask of scores, and write it.
fn mask_of<'py>(
    py: Python<'py>,
    scores: &[f32],
    work: u64,
    write: impl FnOnce(&mut [bool]) -> fastsal_core::Result<()> + Send,
) -> PyResult<Bound<'py, PyArray1<bool>>> {
    let mask = numpy_zeros(py, scores.len())?;
    let mut kept = mask.readwrite();
    let written = slice_mut("mask", &mut kept)?;
    call(py, work, || write(written))?;
    drop(kept);
    Ok(mask)
}
