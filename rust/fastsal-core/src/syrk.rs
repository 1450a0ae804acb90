//! The symmetric rank-k update of one block, `packed += panelᵀ panel`, in register tiles.
//!
//! Only tiles on and above the diagonal are formed. The sums of a tile stay in registers over all rows
//! of the panel and are added to the packed triangle once; between two tiles another piece of work
//! may run while the processor still multiplies.

// Loops over registers index several arrays at once; iterators would hide that.
#![allow(clippy::needless_range_loop, non_upper_case_globals)]

use crate::isa::Isa;
use crate::layout::{row_base, triangle};
use crate::parallel::checkpoint_at;
use crate::rows::RowBytes;
use crate::simd::{dispatch, padded, prefetch, Kernel, Real, Simd};

/// Work to do between two tiles, while the processor still computes the first.
pub(crate) trait Between {
    /// Do a part; return the memory that the next part reads.
    fn step(&mut self) -> Ahead;
}

/// Cache lines to request one at a time, between products: a burst would stall on the few requests
/// that a core has in flight.
pub(crate) struct Ahead {
    at: *const u8,
    /// Cache lines of a row, and how many of the current row are left.
    lines: usize,
    left: usize,
    /// From the end of a row's lines to the next row, in bytes.
    skip: usize,
    rows: usize,
}

const LINE: usize = 64;

impl Ahead {
    pub(crate) const NOTHING: Self =
        Self { at: std::ptr::null(), lines: 0, left: 0, skip: 0, rows: 0 };

    /// The memory of `rows` rows.
    pub(crate) fn rows(RowBytes { start, len, stride }: RowBytes, rows: usize) -> Self {
        let lines = len.div_ceil(LINE);
        let skip = stride.wrapping_sub(lines * LINE);
        Self { at: start, lines, left: lines, skip, rows }
    }

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

/// Add `panelᵀ panel` to `packed`, the upper triangle of `size × size`; `panel` is `[n, stride]`.
pub(crate) fn syrk<T: Real>(
    isa: Isa,
    panel: &[T],
    n: usize,
    size: usize,
    stride: usize,
    packed: &mut [T],
) {
    let (first, fresh, between) = (Reads::All, false, None);
    dispatch(isa, Syrk { panel, n, size, stride, packed, first, fresh, between });
}

/// Set `packed` to `panelᵀ panel` for a square lower triangular `panel`: zero above its diagonal.
pub(crate) fn syrk_of_lower(isa: Isa, panel: &[f64], size: usize, packed: &mut [f64]) {
    let (n, stride) = (size, padded(size));
    let (first, fresh, between) = (Reads::FromDiagonal { until: usize::MAX }, true, None);
    dispatch(isa, Syrk { panel, n, size, stride, packed, first, fresh, between });
}

/// [`syrk`] for a panel whose first `n` columns are lower triangular: zero above its diagonal.
pub(crate) fn syrk_of_lower_and_rest(
    isa: Isa,
    panel: &[f64],
    n: usize,
    size: usize,
    stride: usize,
    packed: &mut [f64],
) {
    let (first, fresh, between) = (Reads::FromDiagonal { until: n }, false, None);
    dispatch(isa, Syrk { panel, n, size, stride, packed, first, fresh, between });
}

/// Which rows of a panel are not zero in a column.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Reads {
    All,
    /// Those from the diagonal on, in the columns before `until`.
    FromDiagonal {
        until: usize,
    },
}

/// The kernel of [`syrk`], with its options.
pub(crate) struct Syrk<'a, T> {
    /// `[n, stride]`
    pub panel: &'a [T],
    pub n: usize,
    pub size: usize,
    pub stride: usize,
    pub packed: &'a mut [T],
    pub first: Reads,
    /// Whether `packed` is overwritten.
    pub fresh: bool,
    pub between: Option<&'a mut dyn Between>,
}

impl<T: Real> Kernel<T> for Syrk<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T = T>>(self, simd: S) {
        add_tiles(simd, self);
    }
}

#[inline(always)]
fn add_tiles<S: Simd>(_simd: S, block: Syrk<'_, S::T>) {
    let Syrk { panel, n, size, stride, packed, first, fresh, between } = block;
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
    // Every strip below is the only one of its shape: each tile is compiled once.
    let mut j = 0;
    while j < size {
        checkpoint_at(j, size);
        let mut i = 0;
        // SAFETY: the assertion bounds every read and write of a tile (see `Tiles::tile`); `_simd` is
        // the proof of the instruction set.
        unsafe {
            // Two vectors of columns share the rows above the end of the first one's diagonal
            // square; the second vector alone has W rows more.
            if j + S::W < size {
                tiles.strip::<2, false>(0, j + whole, j);
                if const { S::HALVES } {
                    tiles.strip::<1, true>(j + whole, j + S::W, j + S::W);
                }
                j += S::W;
                i = j;
            }
            tiles.strip::<1, false>(i, size.min(j + whole), j);
            if const { S::HALVES } {
                tiles.strip::<0, true>(j + whole, size.min(j + S::W), j + S::W);
            }
        }
        j += S::W;
    }
}

/// Repeat a block for `r` in `0..R`, `R <= 8`, each time with `r` a constant: sums indexed only by
/// constants stay in registers.
macro_rules! unroll {
    ($r:ident < $n:ident, $body:block) => {
        unroll!(@ $r, $n, $body, 0, 1, 2, 3, 4, 5, 6, 7)
    };
    (@ $r:ident, $n:ident, $body:block, $($value:literal),*) => {
        $({
            const $r: usize = $value;
            if const { $r < $n } $body
        })*
    };
}

struct Tiles<'a, S: Simd> {
    panel: *const S::T,
    n: usize,
    size: usize,
    stride: usize,
    packed: *mut S::T,
    /// What to request from memory next: the statistics of the block after the next.
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
                let left = i1 - i;
                // Tiles of about equal heights: the lower one is, the more of its time is loads.
                // One vector of columns leaves room for eight.
                let most = if const { NV < 2 } { 8 } else { S::ROWS };
                let rows =
                    if const { S::ROWS == 6 } { left.div_ceil(left.div_ceil(most)) } else { left };
                match rows {
                    1 => self.tile::<1, NV, HALF>(i, j0),
                    3 if const { S::ROWS == 6 } => self.tile::<3, NV, HALF>(i, j0),
                    2 | 3 => self.tile::<2, NV, HALF>(i, j0),
                    5 if const { S::ROWS == 6 } => self.tile::<5, NV, HALF>(i, j0),
                    8.. if const { S::ROWS >= 8 || (S::ROWS == 6 && NV < 2) } => {
                        self.tile::<8, NV, HALF>(i, j0)
                    }
                    6.. if const { S::ROWS >= 6 } => self.tile::<6, NV, HALF>(i, j0),
                    _ => self.tile::<4, NV, HALF>(i, j0),
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
                Reads::FromDiagonal { until } if j0 + NV * S::W <= until => {
                    j0 - if HALF { half } else { 0 }
                }
                Reads::FromDiagonal { .. } => 0,
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
            let columns = NV * S::W + if HALF { half } else { 0 };
            let mut soon = (R * columns * size_of::<S::T>()).div_ceil(LINE);
            let soon_step = soon.div_ceil((samples / 4).max(1));
            for _ in 0..samples / 4 {
                ahead.step();
                ahead.step();
                let lines = soon_step.min(soon);
                for _ in 0..lines {
                    prefetch(self.soon);
                    self.soon = self.soon.wrapping_add(LINE / size_of::<S::T>());
                }
                soon -= lines;
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
