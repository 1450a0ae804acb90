//! Factors and inverses of large matrices in double precision, by panels of rows.
//!
//! A matrix that no cache holds is read again for every few rows that are built from it. Here a panel of
//! [`HEIGHT`] rows is built at a time. The part of the factor that it is multiplied by is packed once, and
//! the columns are divided into strips, each of which is packed and multiplied in a first-level cache
//! (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008).
//! Strips are independent: several threads share a matrix, and each entry is summed in the same order
//! whichever of them forms it.

mod strips;

use std::ops::Range;

use crate::cholesky;
use crate::error::Result;
use crate::isa::Isa;
use crate::layout::triangle;
use crate::memory::Aligned;
use crate::parallel::prelude::*;
use crate::parallel::{checkpoint, parts};
use crate::simd::{dispatch, padded};
use strips::{Product, Solution, Strip, Width, WIDEST};

/// From this size on, a matrix is processed by panels.
pub(crate) const SMALLEST: usize = 384;

/// Rows that are formed together in registers.
const ROWS: usize = 6;

/// Rows of a panel: what is packed is multiplied that many times.
const HEIGHT: usize = 21 * ROWS;

/// Distance of the rows of the square on the diagonal of a panel.
const SIDE: usize = padded(HEIGHT);

/// The threads that share a matrix, and their memory.
pub(crate) struct Panels {
    workers: usize,
    memory: Aligned<f64>,
}

impl Default for Panels {
    fn default() -> Self {
        Self { workers: 1, memory: Aligned::default() }
    }
}

impl Panels {
    /// Make room for matrices of this size, of which `count` are processed at the same time: all threads
    /// share each of them, unless there is one for every thread. (A thread that waits for its part would
    /// begin another matrix.)
    ///
    /// # Errors
    /// [`crate::Error::Memory`] when there is no memory of this size.
    pub(crate) fn reserve(&mut self, what: &'static str, size: usize, count: usize) -> Result<()> {
        let threads = parts();
        self.workers = if count < threads { threads } else { 1 };
        let strips = self.workers.saturating_mul(strip_len(size));
        let len = left_len(size).saturating_add(HEIGHT * SIDE).saturating_add(strips);
        self.memory.reserve(what, if size < SMALLEST { 0 } else { len })
    }

    /// Return the memory of the packed part of a factor, of the square on its diagonal, and of a strip
    /// for each thread.
    fn room(&mut self, size: usize) -> (&mut [f64], &mut [f64], Strips<'_>) {
        let (left, len) = (left_len(size), strip_len(size));
        let memory = self.memory.room(left + HEIGHT * SIDE + self.workers * len);
        let (left, rest) = memory.split_at_mut(left);
        let (square, memory) = rest.split_at_mut(HEIGHT * SIDE);
        (left, square, Strips { memory, len })
    }
}

/// Entries of the packed part of a factor: `[HEIGHT / ROWS, size + ROWS, ROWS]`.
fn left_len(size: usize) -> usize {
    HEIGHT.saturating_mul(size.saturating_add(ROWS))
}

/// Entries of a strip of a matrix, with a panel below it.
fn strip_len(size: usize) -> usize {
    WIDEST.saturating_mul(size.saturating_add(HEIGHT))
}

/// Entries of all packed columns of a matrix: `[groups, size, ROWS]`.
pub(crate) fn columns_len(size: usize) -> usize {
    size.next_multiple_of(ROWS).saturating_mul(size)
}

/// A strip of each thread.
struct Strips<'a> {
    memory: &'a mut [f64],
    len: usize,
}

impl Strips<'_> {
    /// Run `job` for all strips of these columns, each in the memory of its thread.
    fn each(
        &mut self,
        isa: Isa,
        columns: Range<usize>,
        job: impl Fn(&mut [f64], Range<usize>) + Sync + Send,
    ) {
        let (width, workers) = (dispatch(isa, Width), self.memory.len() / self.len);
        self.memory.par_chunks_mut(self.len).enumerate().for_each(|(worker, memory)| {
            for start in columns.clone().step_by(width).skip(worker).step_by(workers) {
                checkpoint();
                job(memory, start..columns.end.min(start + width));
            }
        });
    }
}

/// Entries that several threads write, each its own.
#[derive(Clone, Copy)]
struct Shared(*mut f64);

// SAFETY: whoever writes through the pointer says which entries are its own.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(self, place: usize) -> *mut f64 {
        self.0.wrapping_add(place)
    }
}

/// Rows `start..start + height` of a matrix whose rows are `stride` apart.
#[derive(Clone, Copy)]
struct Panel {
    start: usize,
    height: usize,
    stride: usize,
    /// Whether the matrix is lower triangular: above, a column begins on the diagonal.
    is_lower: bool,
}

impl Panel {
    /// The panels of the first `rows` rows.
    fn all(rows: usize, stride: usize, is_lower: bool) -> impl Iterator<Item = Self> {
        let panel = move |start| Self { start, height: HEIGHT.min(rows - start), stride, is_lower };
        (0..rows).step_by(HEIGHT).map(panel)
    }

    fn end(self) -> usize {
        self.start + self.height
    }

    /// Pack rows `over` of the columns of `U` that the panel is multiplied by: `[groups, depth, ROWS]`, a
    /// group of columns after the other. Columns of no row are those of the identity.
    fn pack(self, u: &[f64], over: Range<usize>, left: &mut [f64]) {
        let depth = left.len() / HEIGHT;
        let groups = left.chunks_mut(depth * ROWS).take(self.height.div_ceil(ROWS));
        for (column, group) in (self.start..).step_by(ROWS).zip(groups) {
            let count = ROWS.min(self.end() - column);
            for k in over.start..over.end.min(column + ROWS) {
                copy_row(&u[k * self.stride + column..][..count], &mut group[k * ROWS..]);
            }
            if over.end == self.end() {
                for k in count..ROWS {
                    let to = &mut group[(column + k) * ROWS..(column + k + 1) * ROWS];
                    to.fill(0.0);
                    to[k] = 1.0;
                }
            }
        }
    }

    /// Subtract what the rows above contribute from columns of the panel and, with `is_solved`, solve for
    /// them: `X ← U⁻ᵀ X`.
    fn solve(
        self,
        isa: Isa,
        strips: &mut Strips<'_>,
        left: &[f64],
        x: &mut [f64],
        columns: Range<usize>,
        is_solved: bool,
    ) {
        assert!(x.len() >= self.end() * self.stride && columns.end <= self.stride);
        let x = Shared(x.as_mut_ptr());
        strips.each(isa, columns, |strip, columns| {
            let first = if self.is_lower { columns.start.min(self.start) } else { 0 };
            // The assertion is what it needs: no other strip has these columns.
            let panel = self;
            dispatch(isa, Strip(Solution { left, x, panel, first, columns, is_solved, strip }));
        });
    }
}

/// Copy a part of a row to its place in a group of columns; the others are zero.
#[inline]
fn copy_row(from: &[f64], to: &mut [f64]) {
    if let Some(from) = from.first_chunk::<ROWS>() {
        to[..ROWS].copy_from_slice(from);
    } else {
        to[..from.len()].copy_from_slice(from);
        to[from.len()..ROWS].fill(0.0);
    }
}

/// [`cholesky::cholesky_rows`], by panels.
pub(crate) fn cholesky_rows(
    isa: Isa,
    a: &mut [f64],
    size: usize,
    rows: usize,
    panels: &mut Panels,
) -> bool {
    let (left, square, mut strips) = panels.room(size);
    for panel in Panel::all(rows, padded(size), false) {
        let Panel { start, height, stride, .. } = panel;
        panel.pack(a, 0..start, left);
        panel.solve(isa, &mut strips, left, a, start..panel.end(), false);
        // The square on the diagonal: its factor is part of what the other columns are solved with.
        let place = |i: usize| ((start + i) * stride + start + i, i * SIDE + i, height - i);
        for (from, to, count) in (0..height).map(place) {
            square[to..to + count].copy_from_slice(&a[from..from + count]);
        }
        if !cholesky::factor(isa, square, height, height, SIDE) {
            return false;
        }
        for (to, from, count) in (0..height).map(place) {
            a[to..to + count].copy_from_slice(&square[from..from + count]);
        }
        panel.pack(a, start..panel.end(), left);
        panel.solve(isa, &mut strips, left, a, panel.end()..size, true);
    }
    true
}

/// [`cholesky::invert_factor`], by panels.
pub(crate) fn invert_factor(
    isa: Isa,
    u: &[f64],
    m: &mut [f64],
    size: usize,
    stride: usize,
    panels: &mut Panels,
) {
    assert!(stride >= padded(size) && u.len() >= size * stride && m.len() >= size * stride);
    let (left, _, mut strips) = panels.room(size);
    for panel in Panel::all(size, stride, true) {
        panel.pack(u, 0..panel.end(), left);
        for i in panel.start..panel.end() {
            m[i * stride..(i + 1) * stride].fill(0.0);
            m[i * stride + i] = 1.0;
        }
        panel.solve(isa, &mut strips, left, m, 0..panel.end(), true);
    }
}

/// Write `MᵀM`, packed, for a lower triangular `M`; `memory` has room for [`columns_len`].
pub(crate) fn square_of_lower(
    isa: Isa,
    m: &[f64],
    size: usize,
    memory: &mut Aligned<f64>,
    packed: &mut [f64],
    panels: &mut Panels,
) {
    let stride = padded(size);
    assert!(m.len() >= size * stride && packed.len() == triangle(size));
    let (_, _, mut strips) = panels.room(size);
    let groups = memory.room(columns_len(size));
    for (column, group) in (0..size).step_by(ROWS).zip(groups.chunks_mut(size * ROWS)) {
        let count = ROWS.min(size - column);
        for (k, to) in group.chunks_exact_mut(ROWS).enumerate().skip(column) {
            copy_row(&m[k * stride + column..][..count], to);
        }
    }
    let (groups, packed) = (&*groups, Shared(packed.as_mut_ptr()));
    strips.each(isa, 0..size, |strip, columns| {
        dispatch(isa, Strip(Product { groups, m, size, columns, packed, strip }));
    });
}

#[cfg(test)]
mod tests;
