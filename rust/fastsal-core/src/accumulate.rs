//! The hot kernel: `F_b += sum_n g_nb g_nbᵀ` for all blocks of a parameter, and `sum_n g_n`.
//!
//! Each task covers a group of blocks, so every entry of the statistics is summed by one worker in
//! the order of the samples: results do not depend on the number of threads. A task processes
//! [`ROWS_PER_STEP`] samples at a time, copies the columns of the blocks into small contiguous panels
//! (rows of a parameter are megabytes apart, often a power of two, and would compete for a few cache
//! sets), and adds the Gram matrix of each panel to the packed upper triangle through register
//! tiles. A tile is summed from zero and added once, so rounding grows with
//! `ROWS_PER_STEP + N / ROWS_PER_STEP` additions rather than with `N`.

mod packing;

use crate::parallel::prelude::*;

use crate::error::{check_length, Error, Result};
use crate::finite::check_finite;
use crate::isa::Isa;
use crate::layout::{row_base, triangle, Layout};
use crate::memory::Aligned;
use crate::parallel;
use crate::rows::{with_rows, AnyRows, Element};
use crate::simd::{dispatch, padded, Real};
use crate::syrk::{Between, Reads, Syrk};
use packing::Packer;

/// Samples that a panel holds. Two panels of blocks of 64 fit into a second-level cache many times
/// over, and the loads and stores at the ends of a tile cost a tenth of its products.
pub const ROWS_PER_STEP: usize = 128;

/// Least number of weights of a task: each task waits for its first panel.
const TASK: usize = 2048;

/// The sums of one parameter, in either precision: `packed` for all blocks, `sums` `[d]`.
#[derive(Debug)]
pub enum Sums<'a> {
    /// Single precision.
    F32 {
        /// `sum_n g_nb g_nbᵀ` of all blocks, packed.
        packed: &'a mut [f32],
        /// `sum_n g_n`.
        sums: &'a mut [f32],
    },
    /// Double precision.
    F64 {
        /// `sum_n g_nb g_nbᵀ` of all blocks, packed.
        packed: &'a mut [f64],
        /// `sum_n g_n`.
        sums: &'a mut [f64],
    },
}

/// Add the statistics of `rows` to the sums of a parameter.
///
/// `fresh` says that `packed` holds nothing yet: it is overwritten, which saves a first pass over new
/// memory to fill it with zeros.
///
/// # Errors
/// [`Error::Length`] for arrays that do not fit the layout; [`Error::NonFiniteGradient`] for the first
/// NaN or infinity, in which case the sums may hold part of the rows and must be discarded;
/// [`Error::Overflow`] likewise for squares that are too large for the type of the sums. Call
/// [`check_finite`] first to avoid that. If the caller stops a call with `fresh`, `sums` are as they
/// were, and `packed` still holds nothing; without, a call runs to its end.
pub fn accumulate(
    isa: Isa,
    layout: Layout,
    rows: AnyRows<'_>,
    sums: Sums<'_>,
    fresh: bool,
) -> Result<()> {
    match sums {
        Sums::F32 { packed, sums } => add(isa, layout, rows, packed, sums, fresh),
        Sums::F64 { packed, sums } => add(isa, layout, rows, packed, sums, fresh),
    }
}

/// [`accumulate`] in one precision.
fn add<T: Real>(
    isa: Isa,
    layout: Layout,
    rows: AnyRows<'_>,
    packed: &mut [T],
    sums: &mut [T],
    fresh: bool,
) -> Result<()> {
    check_length("rows", rows.d(), layout.len())?;
    check_length("packed", packed.len(), layout.packed_len())?;
    check_length("sums", sums.len(), layout.len())?;
    if layout.is_empty() || rows.n() == 0 {
        if fresh {
            packed.fill(T::default());
        }
        return Ok(());
    }
    let clean = if fresh {
        // A call that is stopped, or fails, leaves `sums` as they were.
        let mut after = sums.to_vec();
        let clean = add_rows(isa, layout, rows, packed, &mut after, fresh);
        if clean {
            sums.copy_from_slice(&after);
        }
        clean
    } else {
        add_rows(isa, layout, rows, packed, sums, fresh)
    };
    if clean {
        return Ok(());
    }
    check_finite(rows)?;
    first_overflow(layout, rows, packed).map_or(Ok(()), Err)
}

/// Add rows; return whether all of them, and all squares, were finite.
fn add_rows<T: Real>(
    isa: Isa,
    layout: Layout,
    rows: AnyRows<'_>,
    packed: &mut [T],
    sums: &mut [T],
    fresh: bool,
) -> bool {
    let block = layout.block();
    let group = TASK.div_ceil(block);
    parallel::run(|| {
        packed
            .par_chunks_mut(group * triangle(block))
            .zip(sums.par_chunks_mut(group * block))
            .enumerate()
            .map_init(Aligned::default, |scratch, (task, (packed, sums))| {
                let first_column = task * group * block;
                Task { block, rows, first_column, packed, sums, fresh, scratch }.run(isa)
            })
            .reduce(|| true, |a, b| a & b)
    })
}

/// Find the first weight whose squares have overflowed, and the sample with its largest gradient.
fn first_overflow<T: Real>(layout: Layout, rows: AnyRows<'_>, packed: &[T]) -> Option<Error> {
    let overflows = |b: usize| {
        let (size, block) = (layout.size(b), &packed[layout.packed_range(b)]);
        let i = (0..size).find(|i| !block[row_base(size, *i) + i].finite())?;
        Some(layout.range(b).start + i)
    };
    let column = (0..layout.blocks()).find_map(overflows)?;
    let value = |row: usize| with_rows!(rows, r => r.row(row, column, column + 1)[0].to_f64());
    let row = (0..rows.n()).max_by(|a, b| value(*a).abs().total_cmp(&value(*b).abs()))?;
    Some(Error::Overflow { row, column, value: value(row) })
}

/// A few neighboring blocks, all samples.
struct Task<'a, T> {
    block: usize,
    rows: AnyRows<'a>,
    first_column: usize,
    packed: &'a mut [T],
    sums: &'a mut [T],
    fresh: bool,
    scratch: &'a mut Aligned<T>,
}

impl<T: Real> Task<'_, T> {
    /// Process each block, [`ROWS_PER_STEP`] samples at a time; while one panel is multiplied the next
    /// is packed, or requested from memory. Returns whether all gradients were finite.
    fn run(self, isa: Isa) -> bool {
        let Task { block, rows, first_column, packed, sums, fresh, scratch } = self;
        let (stride, columns) = (padded(block), sums.len());
        let blocks = columns.div_ceil(block);
        let items = blocks * rows.n().div_ceil(ROWS_PER_STEP);
        let panel_len = ROWS_PER_STEP.min(rows.n()) * stride;
        // Values that an earlier task left in the padding are read but never used.
        let (panels, chunk_sums) = scratch.room(2 * panel_len + block).split_at_mut(2 * panel_len);
        let (mut panel, mut next) = panels.split_at_mut(panel_len);
        let packing = |item: usize| {
            let (first, start) = (item / blocks * ROWS_PER_STEP, item % blocks * block);
            let (n, size) = (ROWS_PER_STEP.min(rows.n() - first), block.min(columns - start));
            (first, n, start, size)
        };
        let mut clean = true;
        for item in 0..=items {
            // The last panel has none after it, the first none before.
            let mut packer = (item < items).then(|| {
                let (first, n, start, size) = packing(item);
                let (column, sums) = (first_column + start, &mut chunk_sums[..size]);
                Packer::new(isa, rows, (first, n), column, sums, next, stride)
            });
            if item > 0 {
                let (_, n, start, size) = packing(item - 1);
                let at = start / block * triangle(block);
                let places = at..at + triangle(size);
                let between = packer.as_mut().map(|p| p as &mut dyn Between);
                // The first samples of every block come before the second ones of any.
                let fresh = fresh && item <= blocks;
                let first = Reads::All;
                let to = &mut packed[places.clone()];
                dispatch(isa, Syrk { panel, n, size, stride, packed: to, first, fresh, between });
                if item > items - blocks {
                    // The last samples of the block. No other entry exceeds the diagonal ones.
                    clean &= has_finite_diagonal(&packed[places], size);
                }
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

/// Whether no diagonal entry of a packed triangle is infinite or NaN.
fn has_finite_diagonal<T: Real>(packed: &[T], size: usize) -> bool {
    let mut at = 0;
    // Without an early exit, loads do not wait for comparisons.
    (0..size).fold(true, |is_finite, i| {
        let is_finite = is_finite & packed[at].finite();
        at += size - i;
        is_finite
    })
}

#[cfg(test)]
mod tests;
