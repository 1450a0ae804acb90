//! The hot kernel: `F_b += sum_n g_nb g_nbᵀ` for all blocks of a parameter, and `sum_n g_n`.
//!
//! Work is cut into groups of blocks, one task each, so every entry of the statistics is summed by
//! one worker in the order of the samples: results do not depend on the number of threads. A task
//! takes [`CHUNK`] samples at a time, copies the blocks' columns into small contiguous panels
//! (rows of a parameter lie megabytes apart, often a power of two, and would fight over a few
//! cache sets), and adds each panel's Gram matrix to the packed upper triangle through register
//! tiles. A tile is summed from zero and added once, so rounding grows with `CHUNK + N / CHUNK`
//! additions rather than with `N`.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop, non_upper_case_globals)]

use rayon::prelude::*;

use crate::error::{check_length, Error, Result};
use crate::layout::{row_base, triangle, Layout};
use crate::parallel;
use crate::rows::{Element, Rows};
use crate::simd::{dispatch, prefetch, Isa, Kernel, Real, Simd, WIDEST};

/// Samples that a panel holds: with blocks of 64 it fills half of a first-level cache.
pub const CHUNK: usize = 64;

/// Weights that one task covers at least: a page of float32, read in one stretch per sample.
const TASK: usize = 1024;

/// Round up to whole vectors.
pub(crate) const fn padded(block: usize) -> usize {
    block.next_multiple_of(WIDEST)
}

/// Add the statistics of `rows` to `packed` (all blocks of the parameter) and to `sums` (`[d]`).
///
/// # Errors
/// [`Error::Length`] for arrays that do not fit the layout; [`Error::NonFiniteGradient`] for the
/// first NaN or infinity: the statistics may then hold part of the rows and must be thrown away.
/// Call [`check_finite`] first where that will not do.
pub fn accumulate<E: Element, T: Real>(
    layout: Layout,
    rows: Rows<'_, E>,
    packed: &mut [T],
    sums: &mut [T],
) -> Result<()> {
    accumulate_with(Isa::best(), layout, rows, packed, sums)
}

/// [`accumulate`] with a given instruction set.
///
/// # Errors
/// As [`accumulate`]; [`Error::Value`] when the processor lacks the instruction set.
pub fn accumulate_with<E: Element, T: Real>(
    isa: Isa,
    layout: Layout,
    rows: Rows<'_, E>,
    packed: &mut [T],
    sums: &mut [T],
) -> Result<()> {
    check_length("rows", rows.d(), layout.len)?;
    check_length("packed", packed.len(), layout.packed_len())?;
    check_length("sums", sums.len(), layout.len)?;
    isa.check()?;
    if layout.len == 0 || rows.n() == 0 {
        return Ok(());
    }
    let block = layout.block;
    let group = TASK.div_ceil(block);
    let clean = parallel::run(|| {
        packed
            .par_chunks_mut(group * triangle(block))
            .zip(sums.par_chunks_mut(group * block))
            .enumerate()
            .map_init(Vec::new, |scratch, (task, (packed, sums))| {
                let first_column = task * group * block;
                dispatch(isa, Task { block, rows, first_column, packed, sums, scratch })
            })
            .reduce(|| true, |a, b| a & b)
    });
    // Rows that are finite themselves but not in T show later, as a block that cannot be factored.
    if clean {
        Ok(())
    } else {
        check_finite(rows)
    }
}

/// The first NaN or infinity of `rows`, as the error that reports it.
///
/// # Errors
/// [`Error::NonFiniteGradient`] with the least sample, and its least column, that holds one.
pub fn check_finite<E: Element>(rows: Rows<'_, E>) -> Result<()> {
    const COLUMNS: usize = 1 << 14;
    let parts = rows.d().div_ceil(COLUMNS);
    let first = parallel::run(|| {
        (0..rows.n() * parts).into_par_iter().find_map_first(|task| {
            let (row, from) = (task / parts, task % parts * COLUMNS);
            let values = rows.row(row, from, (from + COLUMNS).min(rows.d()));
            // A fold without an early exit vectorises; the search runs only where it found one.
            if values.iter().fold(true, |clean, v| clean & v.to_f64().finite()) {
                return None;
            }
            let at = values.iter().position(|v| !v.to_f64().finite())?;
            Some(Error::NonFiniteGradient { row, column: from + at, value: values[at].to_f64() })
        })
    });
    first.map_or(Ok(()), Err)
}

/// A few neighbouring blocks, all samples; says whether all gradients were finite.
struct Task<'a, E, T> {
    block: usize,
    rows: Rows<'a, E>,
    first_column: usize,
    packed: &'a mut [T],
    sums: &'a mut [T],
    scratch: &'a mut Vec<T>,
}

impl<E: Element, T: Real> Kernel<T> for Task<'_, E, T> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd<T = T>>(self) -> bool {
        let Task { block, rows, first_column, packed, sums, scratch } = self;
        let (columns, stride) = (sums.len(), padded(block));
        let panel_len = CHUNK.min(rows.n()) * stride;
        let panels = columns.div_ceil(block) * panel_len;
        // What an earlier task left in the padding is read but never used.
        if scratch.len() < panels + columns {
            scratch.resize(panels + columns, T::default());
        }
        let (panels, rest) = scratch.split_at_mut(panels);
        let chunk_sums = &mut rest[..columns];
        let mut clean = true;
        for first in (0..rows.n()).step_by(CHUNK) {
            let n = CHUNK.min(rows.n() - first);
            chunk_sums.fill(T::default());
            let mut r = 0;
            while r < n {
                let rest = &rows.from(first + r);
                let panels = &mut panels[r * stride..];
                r += if n - r >= 4 {
                    pack::<E, T, 4>(rest, first_column, block, panels, panel_len, chunk_sums)
                } else {
                    pack::<E, T, 1>(rest, first_column, block, panels, panel_len, chunk_sums)
                };
            }
            for (total, sum) in sums.iter_mut().zip(chunk_sums.iter()) {
                // A NaN or infinity among the addends is one in the sum.
                clean &= sum.finite();
                *total += *sum;
            }
            for (b, packed) in packed.chunks_mut(triangle(block)).enumerate() {
                let size = block.min(columns - b * block);
                add_gram::<S>(&panels[b * panel_len..][..panel_len], n, size, stride, packed);
            }
        }
        clean
    }
}

/// Copy `R` rows of all blocks into their panels and add them to the sums; `R`.
#[inline(always)]
fn pack<E: Element, T: Real, const R: usize>(
    rows: &Rows<'_, E>,
    first_column: usize,
    block: usize,
    panels: &mut [T],
    panel_len: usize,
    sums: &mut [T],
) -> usize {
    let stride = padded(block);
    let columns = first_column..first_column + sums.len();
    for r in R..(2 * R).min(rows.n()) {
        // The next rows: each lies in pages of its own, where no hardware looks ahead.
        for line in rows.row(r, columns.start, columns.end).chunks(64 / size_of::<E>()) {
            prefetch(line.as_ptr());
        }
    }
    for (b, sums) in sums.chunks_mut(block).enumerate() {
        let start = first_column + b * block;
        let from = std::array::from_fn(|r| rows.row(r, start, start + sums.len()));
        widen_and_sum::<E, T, R>(from, &mut panels[b * panel_len..], stride, sums);
    }
    R
}

/// `to[r * stride..] = from[r]` and `sum += from[r]` for `R` rows, with one pass over the sum.
#[inline(always)]
fn widen_and_sum<E: Element, T: Real, const R: usize>(
    from: [&[E]; R],
    to: &mut [T],
    stride: usize,
    sum: &mut [T],
) {
    // Arrays of a fixed length compile to whole vectors.
    let (whole, rest) = sum.as_chunks_mut::<WIDEST>();
    let start = whole.len() * WIDEST;
    for (c, total) in whole.iter_mut().enumerate() {
        let mut sum = *total;
        for (r, row) in from.iter().enumerate() {
            let Some(row) = row[c * WIDEST..].first_chunk::<WIDEST>() else { return };
            let Some(to) = to[r * stride + c * WIDEST..].first_chunk_mut::<WIDEST>() else {
                return;
            };
            let values = row.map(T::widen);
            *to = values;
            for (sum, value) in sum.iter_mut().zip(values) {
                *sum += value;
            }
        }
        *total = sum;
    }
    for (c, sum) in rest.iter_mut().enumerate() {
        for (r, row) in from.iter().enumerate() {
            let x = T::widen(row[start + c]);
            to[r * stride + start + c] = x;
            *sum += x;
        }
    }
}

/// `packed += panelᵀ panel`, the upper triangle of `size × size`; `panel` is `[n, stride]`.
#[inline(always)]
pub(crate) fn add_gram<S: Simd>(
    panel: &[S::T],
    n: usize,
    size: usize,
    stride: usize,
    packed: &mut [S::T],
) where
    S::T: Real,
{
    dispatch(S::ISA, AddGram { panel, n, size, stride, packed });
}

/// The arguments of [`add_gram`]: a kernel of its own, as many others use it.
struct AddGram<'a, T> {
    panel: &'a [T],
    n: usize,
    size: usize,
    stride: usize,
    packed: &'a mut [T],
}

impl<T: Real> Kernel<T> for AddGram<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = T>>(self) {
        let Self { panel, n, size, stride, packed } = self;
        add_tiles::<S>(panel, n, size, stride, packed);
    }
}

#[inline(always)]
fn add_tiles<S: Simd>(panel: &[S::T], n: usize, size: usize, stride: usize, packed: &mut [S::T]) {
    assert!(panel.len() >= n * stride && stride >= padded(size) && packed.len() == triangle(size));
    let mut tiles = Tiles::<S> {
        panel: panel.as_ptr(),
        n,
        size,
        stride,
        soon: packed.as_ptr_range().end,
        packed: packed.as_mut_ptr(),
    };
    let mut j0 = 0;
    while j0 < size {
        // Two vectors of columns share the rows above the first one's diagonal end; the second
        // vector alone has W rows more.
        let shared = size.min(j0 + S::W);
        if j0 + S::W < size {
            // SAFETY: the assertion bounds every read and write of a tile (see `Tiles::tile`).
            unsafe {
                tiles.strip::<2>(0, shared, j0);
                tiles.strip::<1>(shared, size.min(shared + S::W), shared);
            }
        } else {
            // SAFETY: as above.
            unsafe { tiles.strip::<1>(0, shared, j0) };
        }
        j0 += 2 * S::W;
    }
}

/// Repeat a block for `r` in `0..R`, `R <= 8`, each time with `r` a constant: sums that only
/// constants index stay in registers.
macro_rules! unroll {
    ($r:ident < $n:ident, $body:block) => {
        unroll!(@ $r, $n, $body, 0, 1, 2, 3, 4, 5, 6, 7)
    };
    (@ $r:ident, $n:ident, $body:block, $($value:literal),*) => {
        $({
            const $r: usize = $value;
            if $r < $n $body
        })*
    };
}

struct Tiles<S: Simd> {
    panel: *const S::T,
    n: usize,
    size: usize,
    stride: usize,
    packed: *mut S::T,
    /// What to ask memory for next: the following block's statistics, a tile's worth at a time.
    soon: *const S::T,
}

impl<S: Simd> Tiles<S> {
    /// Rows `i0..i1` of the columns of `NV` vectors from `j0` on.
    #[inline(always)]
    unsafe fn strip<const NV: usize>(&mut self, i0: usize, i1: usize, j0: usize) {
        let mut i = i0;
        while i < i1 {
            let rows = S::ROWS.min(i1 - i);
            // SAFETY: rows i..i + rows and columns from j0 on lie inside the block.
            unsafe {
                match rows {
                    1 => self.tile::<1, NV>(i, j0),
                    2 => self.tile::<2, NV>(i, j0),
                    3 => self.tile::<3, NV>(i, j0),
                    4 => self.tile::<4, NV>(i, j0),
                    5 => self.tile::<5, NV>(i, j0),
                    6 => self.tile::<6, NV>(i, j0),
                    7 => self.tile::<7, NV>(i, j0),
                    _ => self.tile::<8, NV>(i, j0),
                }
            }
            i += rows;
        }
    }

    /// `R` rows from `i0`, `NV` vectors of columns from `j0`, all samples.
    ///
    /// Reads columns below `padded(size) <= stride` of `n` panel rows; writes only entries with
    /// `i <= j < size`.
    #[inline(always)]
    unsafe fn tile<const R: usize, const NV: usize>(&mut self, i0: usize, j0: usize) {
        // SAFETY: see the reads and writes above.
        unsafe {
            for _ in 0..R * NV {
                prefetch(self.soon);
                self.soon = self.soon.wrapping_add(S::W);
            }
            let mut sum = [[S::zero(); NV]; R];
            let (mut left, mut right) = (self.panel.add(i0), self.panel.add(j0));
            for _ in 0..self.n {
                let columns: [S::V; NV] = std::array::from_fn(|v| S::load(right.add(v * S::W)));
                for r in 0..R {
                    let row = S::splat(left.add(r));
                    for v in 0..NV {
                        sum[r][v] = S::mul_add(row, columns[v], sum[r][v]);
                    }
                }
                left = left.wrapping_add(self.stride);
                right = right.wrapping_add(self.stride);
            }
            // All loads before all stores: a row's end and the next row's start share a cache line.
            let row = |r: usize| self.packed.wrapping_add(row_base(self.size, i0 + r) + j0);
            if i0 + R <= j0 + 1 && j0 + NV * S::W <= self.size {
                unroll!(r < R, {
                    for v in 0..NV {
                        sum[r][v] = S::add(S::load(row(r).wrapping_add(v * S::W)), sum[r][v]);
                    }
                });
                unroll!(r < R, {
                    for v in 0..NV {
                        S::store(row(r).wrapping_add(v * S::W), sum[r][v]);
                    }
                });
                return;
            }
            let lanes = |r: usize, v: usize| {
                let j = j0 + v * S::W;
                let lo = (i0 + r).saturating_sub(j).min(S::W);
                (lo, self.size.saturating_sub(j).clamp(lo, S::W))
            };
            unroll!(r < R, {
                for v in 0..NV {
                    let (lo, hi) = lanes(r, v);
                    let old = S::load_lanes(row(r).wrapping_add(v * S::W), lo, hi);
                    sum[r][v] = S::add(old, sum[r][v]);
                }
            });
            unroll!(r < R, {
                for v in 0..NV {
                    let (lo, hi) = lanes(r, v);
                    S::store_lanes(row(r).wrapping_add(v * S::W), sum[r][v], lo, hi);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{random, relative_error};
    use half::{bf16, f16};

    /// `GᵀG` of one block, one product at a time.
    fn slow(rows: &[f64], n: usize, d: usize, layout: Layout) -> Vec<f64> {
        let mut packed = Vec::new();
        for b in 0..layout.blocks() {
            let (start, size) = (b * layout.block, layout.size(b));
            for i in 0..size {
                for j in i..size {
                    let at = |r: usize, c: usize| rows[r * d + start + c];
                    packed.push((0..n).map(|r| at(r, i) * at(r, j)).sum());
                }
            }
        }
        packed
    }

    fn check<E: Element, T: Real>(to: impl Fn(f64) -> E, tolerance: f64) {
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
                let (layout, stride) = (Layout::new(d, block), d + 3);
                let data: Vec<E> = random(n as u64, n * stride).into_iter().map(&to).collect();
                let exact: Vec<f64> =
                    (0..n * d).map(|i| data[i / d * stride + i % d].to_f64()).collect();
                let rows = Rows::new(&data, n, d, stride).expect("rows");
                let mut packed = vec![T::default(); layout.packed_len()];
                let mut sums = vec![T::default(); d];
                accumulate_with(isa, layout, rows, &mut packed, &mut sums).expect("first");
                accumulate_with(isa, layout, rows, &mut packed, &mut sums).expect("second");
                let twice = |x: &f64| 2.0 * x;
                let expected: Vec<f64> = slow(&exact, n, d, layout).iter().map(twice).collect();
                assert!(relative_error(&packed, &expected) < tolerance, "{isa:?} {n} {d} {block}");
                let expected: Vec<f64> =
                    (0..d).map(|c| 2.0 * (0..n).map(|r| exact[r * d + c]).sum::<f64>()).collect();
                assert!(
                    relative_error(&sums, &expected) < tolerance,
                    "sums {isa:?} {n} {d} {block}"
                );
            }
        }
    }

    #[test]
    fn equals_the_slow_sum() {
        check::<f64, f64>(|x| x, 1e-14);
        check::<f32, f64>(|x| x as f32, 1e-14);
        check::<f32, f32>(|x| x as f32, 1e-6);
        check::<bf16, f32>(bf16::from_f64, 1e-6);
        check::<f16, f32>(f16::from_f64, 1e-6);
    }

    #[test]
    fn does_not_depend_on_threads() {
        let (n, d) = (100, 10_000);
        let data: Vec<f32> = random(1, n * d).into_iter().map(|x| x as f32).collect();
        let layout = Layout::new(d, 64);
        let statistics = |threads| {
            let (mut packed, mut sums) = (vec![0f32; layout.packed_len()], vec![0f32; d]);
            let rows = Rows::new(&data, n, d, d).expect("rows");
            parallel::set_threads(threads);
            accumulate(layout, rows, &mut packed, &mut sums).expect("accumulate");
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
        let rows = Rows::new(&data, n, d, d).expect("rows");
        let layout = Layout::new(d, 64);
        let (mut packed, mut sums) = (vec![0f32; layout.packed_len()], vec![0f32; d]);
        for result in [check_finite(rows), accumulate(layout, rows, &mut packed, &mut sums)] {
            match result {
                Err(Error::NonFiniteGradient { row: 3, column: 39_999, value }) => {
                    assert!(value.is_nan());
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
