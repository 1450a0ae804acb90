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

/// Samples that a panel holds: two panels of blocks of 64 fit a second-level cache many times over,
/// and the ends of a tile, its loads and stores, cost a tenth of its products.
pub const CHUNK: usize = 128;

/// Weights that one task covers at least: the first panel of a task has to be waited for.
const TASK: usize = 2048;

/// Round up to whole vectors.
pub(crate) const fn padded(block: usize) -> usize {
    block.next_multiple_of(WIDEST)
}

/// Add the statistics of `rows` to `packed` (all blocks of the parameter) and to `sums` (`[d]`).
///
/// `fresh` says that `packed` holds nothing yet: it is overwritten, which spares fresh memory a
/// first pass of zeros.
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
    fresh: bool,
) -> Result<()> {
    accumulate_with(Isa::best(), layout, rows, packed, sums, fresh)
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
    fresh: bool,
) -> Result<()> {
    check_length("rows", rows.d(), layout.len)?;
    check_length("packed", packed.len(), layout.packed_len())?;
    check_length("sums", sums.len(), layout.len)?;
    isa.check()?;
    if layout.len == 0 || rows.n() == 0 {
        if fresh {
            packed.fill(T::default());
        }
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
                Task { block, rows, first_column, packed, sums, fresh, scratch }.run(isa)
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
    fresh: bool,
    scratch: &'a mut Vec<T>,
}

impl<E: Element, T: Real> Task<'_, E, T> {
    /// Each block, [`CHUNK`] samples at a time; while one panel is multiplied the next is packed.
    fn run(self, isa: Isa) -> bool {
        let Task { block, rows, first_column, packed, sums, fresh, scratch } = self;
        let (stride, columns) = (padded(block), sums.len());
        let blocks = columns.div_ceil(block);
        let items = blocks * rows.n().div_ceil(CHUNK);
        let panel_len = CHUNK.min(rows.n()) * stride;
        // What an earlier task left in the padding is read but never used.
        if scratch.len() < 2 * panel_len + block {
            scratch.resize(2 * panel_len + block, T::default());
        }
        let (panels, chunk_sums) = scratch.split_at_mut(2 * panel_len);
        let (mut panel, mut next) = panels.split_at_mut(panel_len);
        let packing = |item: usize| {
            let (first, start) = (item / blocks * CHUNK, item % blocks * block);
            let (n, size) = (CHUNK.min(rows.n() - first), block.min(columns - start));
            (rows.from(first), n, start, size)
        };
        let mut clean = true;
        for item in 0..=items {
            // The last panel has none after it, the first none before.
            let mut packer = (item < items).then(|| {
                let (rows, n, start, size) = packing(item);
                let sums = &mut chunk_sums[..size];
                sums.fill(T::default());
                Packer {
                    isa,
                    rows,
                    n,
                    row: 0,
                    column: first_column + start,
                    sums,
                    panel: next,
                    stride,
                    step: steps(n, size),
                    looks_on: true,
                }
            });
            if item > 0 {
                let (_, n, start, size) = packing(item - 1);
                let at = start / block * triangle(block);
                let packed = &mut packed[at..at + triangle(size)];
                let between = packer.as_mut().map(|p| p as &mut dyn Between);
                // The first samples of every block come before the second ones of any.
                let fresh = fresh && item <= blocks;
                dispatch(
                    isa,
                    AddGram { panel, n, size, stride, packed, first: Reads::All, fresh, between },
                );
            }
            if let Some(mut packer) = packer {
                packer.finish();
                let start = packer.column - first_column;
                for (total, sum) in sums[start..].iter_mut().zip(packer.sums.iter()) {
                    // A NaN or infinity among the addends is one in the sum.
                    clean &= sum.finite();
                    *total += *sum;
                }
            }
            std::mem::swap(&mut panel, &mut next);
        }
        clean
    }
}

/// Rows of a panel to pack with each tile of the panel before.
fn steps(n: usize, size: usize) -> usize {
    // About as many tiles as AVX-512 takes; what is left over is packed at the end.
    let tiles = (size * size).div_ceil(512).max(1);
    n.div_ceil(tiles).next_multiple_of(4)
}

/// What is done between two tiles, while the processor still works on the first.
pub(crate) trait Between {
    /// Does a part; says what memory the next part reads.
    fn step(&mut self) -> Ahead;
}

/// Lines of memory to ask for one at a time, between products: a burst would stall on the few
/// requests that a core has under way.
pub(crate) struct Ahead {
    at: *const u8,
    /// Cache lines of a row, and how many of the present row are left.
    lines: usize,
    left: usize,
    /// From the end of a row's lines to the next row, in bytes.
    skip: usize,
    rows: usize,
}

const LINE: usize = 64;

impl Ahead {
    const NOTHING: Self = Self { at: std::ptr::null(), lines: 0, left: 0, skip: 0, rows: 0 };

    #[inline(always)]
    fn step(&mut self) {
        if self.rows > 0 {
            prefetch(self.at);
            self.at = self.at.wrapping_add(LINE);
            self.left -= 1;
            if self.left == 0 {
                self.left = self.lines;
                self.at = self.at.wrapping_add(self.skip);
                self.rows -= 1;
            }
        }
    }
}

/// Copies the columns of one block, of up to [`CHUNK`] rows, into a contiguous panel.
struct Packer<'a, E, T> {
    isa: Isa,
    rows: Rows<'a, E>,
    n: usize,
    /// The row that comes next.
    row: usize,
    column: usize,
    sums: &'a mut [T],
    panel: &'a mut [T],
    stride: usize,
    /// Rows to pack at a time.
    step: usize,
    /// Whether memory has still to be asked for what comes after this panel.
    looks_on: bool,
}

impl<E: Element, T: Real> Packer<'_, E, T> {
    fn pack(&mut self, rows: usize) {
        let end = self.n.min(self.row + rows);
        if self.row < end {
            dispatch(self.isa, PackRows { packer: self, end });
        }
    }

    fn finish(&mut self) {
        self.pack(self.n);
    }
}

impl<E: Element, T: Real> Between for Packer<'_, E, T> {
    fn step(&mut self) -> Ahead {
        self.pack(self.step);
        let lines = (self.sums.len() * size_of::<E>()).div_ceil(LINE);
        let (row, column) = if self.row < self.n {
            (self.row, self.column)
        } else if std::mem::replace(&mut self.looks_on, false) {
            // The first rows of the block that follows: nobody packs before them.
            (0, self.column + self.sums.len())
        } else {
            return Ahead::NOTHING;
        };
        Ahead {
            // Addresses past the end do no harm: nothing is read.
            at: self.rows.address(row, column).cast(),
            lines,
            left: lines,
            skip: (self.rows.stride() * size_of::<E>()).wrapping_sub(lines * LINE),
            rows: self.step.min(self.n - row),
        }
    }
}

struct PackRows<'p, 'a, E, T> {
    packer: &'p mut Packer<'a, E, T>,
    end: usize,
}

impl<E: Element, T: Real> Kernel<T> for PackRows<'_, '_, E, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = T>>(self) {
        let Self { packer, end } = self;
        let stride = packer.stride;
        while packer.row < end {
            let panel = &mut packer.panel[packer.row * stride..];
            let rows = packer.rows.from(packer.row);
            packer.row += if end - packer.row >= 4 {
                pack::<E, T, 4>(&rows, packer.column, panel, stride, packer.sums)
            } else {
                pack::<E, T, 1>(&rows, packer.column, panel, stride, packer.sums)
            };
        }
    }
}

/// Copy `R` rows of one block into its panel and add them to the sums; `R`.
#[inline(always)]
fn pack<E: Element, T: Real, const R: usize>(
    rows: &Rows<'_, E>,
    column: usize,
    to: &mut [T],
    stride: usize,
    sums: &mut [T],
) -> usize {
    let from: [&[E]; R] = std::array::from_fn(|r| rows.row(r, column, column + sums.len()));
    // Arrays of a fixed length compile to whole vectors.
    let (whole, rest) = sums.as_chunks_mut::<WIDEST>();
    let start = whole.len() * WIDEST;
    for (c, total) in whole.iter_mut().enumerate() {
        let mut sum = *total;
        for (r, row) in from.iter().enumerate() {
            let Some(row) = row[c * WIDEST..].first_chunk::<WIDEST>() else { return R };
            let Some(to) = to[r * stride + c * WIDEST..].first_chunk_mut::<WIDEST>() else {
                return R;
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
    R
}

/// `packed += panelᵀ panel`, the upper triangle of `size × size`; `panel` is `[n, stride]`.
pub(crate) fn add_gram<T: Real>(
    isa: Isa,
    panel: &[T],
    n: usize,
    size: usize,
    stride: usize,
    packed: &mut [T],
) {
    let (first, fresh, between) = (Reads::All, false, None);
    dispatch(isa, AddGram { panel, n, size, stride, packed, first, fresh, between });
}

/// `packed = panelᵀ panel` of a square lower triangular panel: row `k` is zero beyond column `k`.
pub(crate) fn gram_of_lower<T: Real>(
    isa: Isa,
    panel: &[T],
    size: usize,
    stride: usize,
    packed: &mut [T],
) {
    let (first, fresh, between) = (Reads::FromDiagonal, true, None);
    dispatch(isa, AddGram { panel, n: size, size, stride, packed, first, fresh, between });
}

/// Which rows of a panel are not zero in a column.
#[derive(Clone, Copy, PartialEq)]
enum Reads {
    All,
    FromDiagonal,
}

/// The arguments of [`add_gram`]: a kernel of its own, as many others use it.
struct AddGram<'a, T> {
    panel: &'a [T],
    n: usize,
    size: usize,
    stride: usize,
    packed: &'a mut [T],
    first: Reads,
    /// Whether `packed` is overwritten.
    fresh: bool,
    between: Option<&'a mut dyn Between>,
}

impl<T: Real> Kernel<T> for AddGram<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = T>>(self) {
        add_tiles::<S>(self);
    }
}

#[inline(always)]
fn add_tiles<S: Simd>(block: AddGram<'_, S::T>) {
    let AddGram { panel, n, size, stride, packed, first, fresh, between } = block;
    assert!(panel.len() >= n * stride && stride >= padded(size) && packed.len() == triangle(size));
    let mut tiles = Tiles::<'_, S> {
        panel: panel.as_ptr(),
        n,
        size,
        stride,
        soon: packed.as_ptr().wrapping_add(2 * packed.len()),
        packed: packed.as_mut_ptr(),
        first,
        fresh,
        between,
    };
    // Rows of a vector of columns' diagonal square that need the whole vector; the others need its
    // second half.
    let whole = if S::HALVES { S::W / 2 } else { S::W };
    let mut j0 = 0;
    while j0 < size {
        // Two vectors of columns share the rows above the first one's diagonal end; the second
        // vector alone has W rows more.
        let (j1, j2) = (j0 + S::W, j0 + 2 * S::W);
        // SAFETY: the assertion bounds every read and write of a tile (see `Tiles::tile`).
        unsafe {
            if j1 < size {
                tiles.strip::<2, false>(0, j0 + whole, j0);
                tiles.strip::<1, true>(j0 + whole, j1, j1);
                tiles.strip::<1, false>(j1, size.min(j1 + whole), j1);
                tiles.strip::<0, true>(j1 + whole, size.min(j2), j2);
            } else {
                tiles.strip::<1, false>(0, size.min(j0 + whole), j0);
                tiles.strip::<0, true>(j0 + whole, size, j1);
            }
        }
        j0 = j2;
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

struct Tiles<'a, S: Simd> {
    panel: *const S::T,
    n: usize,
    size: usize,
    stride: usize,
    packed: *mut S::T,
    /// What to ask memory for next: the statistics of the block after the next.
    soon: *const S::T,
    first: Reads,
    /// Whether `packed` is overwritten.
    fresh: bool,
    between: Option<&'a mut dyn Between>,
}

impl<S: Simd> Tiles<'_, S> {
    /// Rows `i0..i1` of the columns of `NV` vectors from `j0` on and, with `HALF`, of half a vector
    /// before them.
    #[inline(always)]
    unsafe fn strip<const NV: usize, const HALF: bool>(&mut self, i0: usize, i1: usize, j0: usize) {
        let mut i = i0;
        while i < i1 {
            // SAFETY: rows i..i + rows and columns from j0 on lie inside the block.
            i += unsafe {
                match S::ROWS.min(i1 - i) {
                    1 => self.tile::<1, NV, HALF>(i, j0),
                    2..4 => self.tile::<2, NV, HALF>(i, j0),
                    4..6 => self.tile::<4, NV, HALF>(i, j0),
                    6..8 => self.tile::<6, NV, HALF>(i, j0),
                    _ => self.tile::<8, NV, HALF>(i, j0),
                }
            };
        }
    }

    /// `R` rows from `i0`, `NV` vectors of columns from `j0` and half a vector before, all samples;
    /// `R`.
    ///
    /// Reads columns below `padded(size) <= stride` of `n` panel rows; writes only entries with
    /// `i <= j < size`.
    #[inline(always)]
    unsafe fn tile<const R: usize, const NV: usize, const HALF: bool>(
        &mut self,
        i0: usize,
        j0: usize,
    ) -> usize {
        let half = S::Half::W;
        let mut ahead = self.between.as_mut().map_or(Ahead::NOTHING, |between| between.step());
        // SAFETY: see the reads and writes above.
        unsafe {
            let mut sum = [[S::zero(); NV]; R];
            let mut half_sum = [S::Half::zero(); R];
            let start = match self.first {
                Reads::All => 0,
                Reads::FromDiagonal => j0 - if HALF { half } else { 0 },
            };
            let panel = self.panel.add(start * self.stride);
            let (mut left, mut right) = (panel.add(i0), panel.wrapping_add(j0));
            // A closure would not inherit the instruction set.
            macro_rules! sample {
                () => {{
                    let columns: [S::V; NV] =
                        std::array::from_fn(|v| S::load(right.wrapping_add(v * S::W)));
                    let half_columns = if HALF {
                        S::Half::load(right.wrapping_sub(half))
                    } else {
                        S::Half::zero()
                    };
                    for r in 0..R {
                        if NV > 0 {
                            let row = S::splat(left.add(r));
                            for v in 0..NV {
                                sum[r][v] = S::mul_add(row, columns[v], sum[r][v]);
                            }
                        }
                        if HALF {
                            let row = S::Half::splat(left.add(r));
                            half_sum[r] = S::Half::mul_add(row, half_columns, half_sum[r]);
                        }
                    }
                    left = left.wrapping_add(self.stride);
                    right = right.wrapping_add(self.stride);
                }};
            }
            let samples = self.n - start;
            // As much of later statistics as this tile covers of these, spread over the samples.
            let soon = (R * (NV * S::W + half) * size_of::<S::T>()).div_ceil(LINE);
            let soon_step = soon.div_ceil((samples / 4).max(1));
            for _ in 0..samples / 4 {
                ahead.step();
                ahead.step();
                for _ in 0..soon_step {
                    prefetch(self.soon);
                    self.soon = self.soon.wrapping_add(LINE / size_of::<S::T>());
                }
                sample!();
                sample!();
                sample!();
                sample!();
            }
            for _ in 0..samples % 4 {
                sample!();
            }
            let row = |r: usize| self.packed.wrapping_add(row_base(self.size, i0 + r) + j0);
            // Lanes lo..hi of W from column j on that lie in row i of the triangle.
            let lanes = |r: usize, j: usize, w: usize| {
                let lo = (i0 + r).saturating_sub(j).min(w);
                (lo, self.size.saturating_sub(j).clamp(lo, w))
            };
            let is_new = self.fresh;
            // All loads before all stores: a row's end and the next row's start share a cache line.
            if HALF {
                unroll!(r < R, {
                    let (lo, hi) = lanes(r, j0 - half, half);
                    if !is_new {
                        let old = S::Half::load_lanes(row(r).wrapping_sub(half), lo, hi);
                        half_sum[r] = S::Half::add(old, half_sum[r]);
                    }
                });
                unroll!(r < R, {
                    let (lo, hi) = lanes(r, j0 - half, half);
                    S::Half::store_lanes(row(r).wrapping_sub(half), half_sum[r], lo, hi);
                });
            }
            if i0 + R <= j0 + 1 && j0 + NV * S::W <= self.size {
                unroll!(r < R, {
                    for v in 0..NV {
                        if !is_new {
                            sum[r][v] = S::add(S::load(row(r).wrapping_add(v * S::W)), sum[r][v]);
                        }
                    }
                });
                unroll!(r < R, {
                    for v in 0..NV {
                        S::store(row(r).wrapping_add(v * S::W), sum[r][v]);
                    }
                });
                return R;
            }
            unroll!(r < R, {
                for v in 0..NV {
                    if !is_new {
                        let (lo, hi) = lanes(r, j0 + v * S::W, S::W);
                        let old = S::load_lanes(row(r).wrapping_add(v * S::W), lo, hi);
                        sum[r][v] = S::add(old, sum[r][v]);
                    }
                }
            });
            unroll!(r < R, {
                for v in 0..NV {
                    let (lo, hi) = lanes(r, j0 + v * S::W, S::W);
                    S::store_lanes(row(r).wrapping_add(v * S::W), sum[r][v], lo, hi);
                }
            });
        }
        R
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
                // What fresh memory holds is not read.
                let mut packed = vec![T::from_f64(f64::NAN); layout.packed_len()];
                let mut sums = vec![T::default(); d];
                accumulate_with(isa, layout, rows, &mut packed, &mut sums, true).expect("first");
                accumulate_with(isa, layout, rows, &mut packed, &mut sums, false).expect("second");
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
            accumulate(layout, rows, &mut packed, &mut sums, false).expect("accumulate");
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
        for result in [check_finite(rows), accumulate(layout, rows, &mut packed, &mut sums, false)]
        {
            match result {
                Err(Error::NonFiniteGradient { row: 3, column: 39_999, value }) => {
                    assert!(value.is_nan());
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
