//! Copies of gradients in small contiguous panels, made while the panel before is multiplied.

use crate::isa::{Isa, Set};
use crate::rows::{with_rows, AnyRows, Element, Rows};
use crate::simd::{dispatch, Kernel, Real, Simd, PADDING};
use crate::syrk::{Ahead, Between};

/// Bytes of a panel that stays in a first-level cache beside the next one and the rows that are packed
/// into that. Packing between tiles is faster for larger ones alone.
const SMALL_PANEL: usize = 12 << 10;

/// Rows that are requested ahead of those that are packed: where rows are a power of two apart, a set of a
/// first-level cache holds no more of them.
const WAYS: usize = 8;

/// Rows of a panel to pack with each tile of the panel before.
fn rows_per_tile(isa: Isa, n: usize, size: usize) -> usize {
    // About as many tiles as the instruction set uses; the remainder is packed at the end.
    let entries = if isa.set() == Set::Avx512 { 512 } else { 192 };
    let tiles = (size * size).div_ceil(entries).max(1);
    n.div_ceil(tiles).next_multiple_of(4)
}

/// Copies the columns of one block, of some rows, into a contiguous panel.
pub(super) struct Packer<'a, T> {
    isa: Isa,
    rows: AnyRows<'a>,
    /// The first row of the panel.
    first: usize,
    /// Rows of the panel.
    n: usize,
    /// The next row of the panel.
    row: usize,
    pub column: usize,
    pub sums: &'a mut [T],
    panel: &'a mut [T],
    stride: usize,
    /// Rows to pack, or to request, at a time.
    step: usize,
    /// Whether rows are packed between tiles. Otherwise they are only requested from memory there, and
    /// packed together after the last tile.
    packs_between: bool,
    /// Rows that are requested before they are packed.
    lead: usize,
    /// The next row to request; those from `n` on are the first ones of the next block.
    requested: usize,
}

impl<'a, T: Real> Packer<'a, T> {
    /// For rows `first..first + n` of the columns from `column` on, as many as there are `sums`, which are
    /// set to zero.
    pub fn new(
        isa: Isa,
        rows: AnyRows<'a>,
        (first, n): (usize, usize),
        column: usize,
        sums: &'a mut [T],
        panel: &'a mut [T],
        stride: usize,
    ) -> Self {
        sums.fill(T::default());
        let step = rows_per_tile(isa, n, sums.len());
        let packs_between = n * stride * size_of::<T>() > SMALL_PANEL;
        let lead = WAYS.next_multiple_of(step);
        let requested = if packs_between { lead } else { 0 };
        let row = 0;
        Self {
            isa,
            rows,
            first,
            n,
            row,
            column,
            sums,
            panel,
            stride,
            step,
            packs_between,
            lead,
            requested,
        }
    }

    fn pack(&mut self, rows: usize) {
        let count = rows.min(self.n - self.row);
        let Self { isa, first, row, column, stride, .. } = *self;
        let (panel, sums) = (&mut self.panel[row * stride..], &mut *self.sums);
        with_rows!(self.rows, rows => {
            let rows = rows.from(first + row);
            dispatch(isa, PackRows { rows, count, column, sums, panel, stride });
        });
        self.row += count;
    }

    /// The memory of the next rows from `row` on, of as many columns as the block has.
    fn request(&self, row: usize, column: usize) -> Ahead {
        if row >= self.n {
            return Ahead::NOTHING;
        }
        // Addresses past the end do no harm: nothing is read.
        let bytes = self.rows.bytes(self.first + row, column, self.sums.len());
        Ahead::rows(bytes, self.step.min(self.n - row))
    }

    /// Pack what is left.
    pub fn finish(&mut self) {
        if self.row < self.n {
            self.pack(self.n);
        }
    }
}

impl<T: Real> Between for Packer<'_, T> {
    fn step(&mut self) -> Ahead {
        if !self.packs_between {
            let row = self.requested;
            self.requested += self.step;
            return self.request(row, self.column);
        }
        if self.row < self.n {
            self.pack(self.step);
        }
        let row = self.requested;
        if row >= self.n + self.lead {
            return Ahead::NOTHING;
        }
        self.requested += self.step;
        if row < self.n {
            return self.request(row, self.column);
        }
        // The first rows of the following block.
        self.request(row - self.n, self.column + self.sums.len())
    }
}

/// Copy the first `count` of `rows` into a panel and add them to the sums.
struct PackRows<'a, E, T> {
    rows: Rows<'a, E>,
    count: usize,
    column: usize,
    sums: &'a mut [T],
    panel: &'a mut [T],
    stride: usize,
}

impl<E: Element, T: Real> Kernel<T> for PackRows<'_, E, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = T>>(self, simd: S) {
        let Self { rows, count, column, sums, panel, stride } = self;
        let mut row = 0;
        while row < count {
            let panel = &mut panel[row * stride..];
            let rows = rows.from(row);
            row += if count - row >= 4 {
                pack::<E, S, 4>(simd, &rows, column, panel, stride, sums)
            } else {
                pack::<E, S, 1>(simd, &rows, column, panel, stride, sums)
            };
        }
    }
}

/// Copy `R` rows of one block into its panel and add them to the sums; return `R`.
#[inline(always)]
fn pack<E: Element, S: Simd, const R: usize>(
    simd: S,
    rows: &Rows<'_, E>,
    column: usize,
    to: &mut [S::T],
    stride: usize,
    sums: &mut [S::T],
) -> usize {
    let from: [&[E]; R] = std::array::from_fn(|r| rows.row(r, column, column + sums.len()));
    // Arrays of a fixed length compile to whole vectors.
    let (whole, rest) = sums.as_chunks_mut::<PADDING>();
    let start = whole.len() * PADDING;
    for (c, total) in whole.iter_mut().enumerate() {
        let mut sum = *total;
        for (r, row) in from.iter().enumerate() {
            let Some(row) = row[c * PADDING..].first_chunk::<PADDING>() else { return R };
            let Some(to) = to[r * stride + c * PADDING..].first_chunk_mut::<PADDING>() else {
                return R;
            };
            let values = S::T::widen_all(simd, *row);
            *to = values;
            for (sum, value) in sum.iter_mut().zip(values) {
                *sum += value;
            }
        }
        *total = sum;
    }
    for (c, sum) in rest.iter_mut().enumerate() {
        for (r, row) in from.iter().enumerate() {
            let x = S::T::widen(row[start + c]);
            to[r * stride + start + c] = x;
            *sum += x;
        }
    }
    R
}
