//! The hot kernel: `F_b += sum_n g_nb g_nbᵀ` for all blocks of a parameter, and `sum_n g_n`.
//!
//! Work is cut into groups of blocks, one task each, so every entry of the statistics is summed by
//! one worker in the order of the samples: results do not depend on the number of threads. A task
//! takes [`CHUNK`] samples at a time, copies the blocks' columns into small contiguous panels
//! (rows of a parameter lie megabytes apart, often a power of two, and would fight over a few
//! cache sets), and adds each panel's Gram matrix to the packed upper triangle through register
//! tiles. A tile is summed from zero and added once, so rounding grows with `CHUNK + N / CHUNK`
//! additions rather than with `N`.

use rayon::prelude::*;

use crate::error::{check_length, Error, Result};
use crate::layout::{triangle, Layout};
use crate::parallel;
use crate::rows::{Element, Rows};
use crate::simd::{dispatch, Isa, Kernel, Real, Simd, WIDEST};
use crate::tiles::{padded, AddGram, Ahead, Between, Reads};

/// Samples that a panel holds: two panels of blocks of 64 fit a second-level cache many times over,
/// and the ends of a tile, its loads and stores, cost a tenth of its products.
pub const CHUNK: usize = 128;

/// Weights that one task covers at least: the first panel of a task has to be waited for.
const TASK: usize = 2048;

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
        let (row, column) = if self.row < self.n {
            (self.row, self.column)
        } else if std::mem::replace(&mut self.looks_on, false) {
            // The first rows of the block that follows: nobody packs before them.
            (0, self.column + self.sums.len())
        } else {
            return Ahead::NOTHING;
        };
        // Addresses past the end do no harm: nothing is read.
        let at = self.rows.address(row, column);
        Ahead::rows(at, self.sums.len(), self.rows.stride(), self.step.min(self.n - row))
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
