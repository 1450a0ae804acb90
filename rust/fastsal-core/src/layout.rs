//! How a parameter of `d` weights is cut into blocks, and where the entries of a block are stored.
//!
//! A parameter is cut into consecutive blocks of `B` weights; the last one may be shorter. The
//! statistics of a block of `b` weights are the upper triangle of its symmetric matrix, row by row:
//! entry `(i, j)`, `i <= j`, is stored at `row_base(b, i) + j`.

use crate::error::{Error, Result};
use crate::simd::PADDING;

/// The cut of one parameter into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    len: usize,
    block: usize,
}

impl Layout {
    /// Cut `len` weights into blocks of `block`; a block larger than the parameter is the parameter.
    ///
    /// # Errors
    /// [`Error::Value`] when `block` is zero, or when the blocks, with padded rows, have more entries
    /// than `usize` counts. No size of a layout wraps.
    pub fn new(len: usize, block: usize) -> Result<Self> {
        let refuse =
            |expected| Err(Error::Value { what: "block_size", got: block.to_string(), expected });
        if block == 0 {
            return refuse("1 or more");
        }
        let block = block.min(len.max(1));
        let entries = block
            .checked_next_multiple_of(PADDING)
            // A row more, as in the triangle and in the matrices of a worker.
            .and_then(|row| block.checked_add(1)?.checked_mul(row))
            .and_then(|b| b.checked_mul(len.div_ceil(block)));
        if entries.is_none() {
            return refuse("small enough for the blocks to fit into memory");
        }
        Ok(Self { len, block })
    }

    /// Number of weights, `d`.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no weights.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Block size, `B >= 1`, at most `d` unless there are no weights.
    #[must_use]
    pub fn block(&self) -> usize {
        self.block
    }

    /// Number of blocks, including the short last one.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.len.div_ceil(self.block)
    }

    /// Number of weights in block `b`; zero after the last one.
    #[must_use]
    pub fn size(&self, b: usize) -> usize {
        self.block.min(self.len.saturating_sub(b.saturating_mul(self.block)))
    }

    /// Places of the weights of block `b` in the parameter.
    #[must_use]
    pub fn range(&self, b: usize) -> std::ops::Range<usize> {
        let start = b.saturating_mul(self.block).min(self.len);
        start..start + self.size(b)
    }

    /// Length of the packed statistics of the whole parameter.
    #[must_use]
    pub fn packed_len(&self) -> usize {
        let full = self.len / self.block;
        full * triangle(self.block) + triangle(self.len % self.block)
    }

    /// Places of block `b` in the packed statistics.
    #[must_use]
    pub fn packed_range(&self, b: usize) -> std::ops::Range<usize> {
        let start = b.saturating_mul(triangle(self.block)).min(self.packed_len());
        start..start + triangle(self.size(b))
    }

    /// Length of all blocks as full matrices, `[blocks, B, B]`.
    #[must_use]
    pub fn dense_len(&self) -> usize {
        self.blocks() * self.block * self.block
    }
}

/// Number of entries in the upper triangle of a `b × b` matrix.
#[must_use]
pub const fn triangle(b: usize) -> usize {
    b * (b + 1) / 2
}

/// Offset such that entry `(i, j)`, `i <= j`, of a packed `b × b` triangle is at `row_base + j`.
#[must_use]
pub const fn row_base(b: usize, i: usize) -> usize {
    // i rows of lengths b, b-1, ... come first; the row itself starts at column i.
    (i * (2 * b - i + 1)) / 2 - i
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_follow_each_other() {
        for b in 1..20 {
            let mut at = 0;
            for i in 0..b {
                for j in i..b {
                    assert_eq!(row_base(b, i) + j, at);
                    at += 1;
                }
            }
            assert_eq!(at, triangle(b));
        }
    }

    #[test]
    fn blocks_cover_the_parameter() {
        for (len, block) in [(1, 64), (64, 64), (65, 64), (1000, 64), (7, 1), (100, 1000), (0, 3)] {
            let layout = Layout::new(len, block).expect("layout");
            let (mut weights, mut entries) = (0, 0);
            for b in 0..layout.blocks() {
                assert_eq!(layout.range(b).start, weights);
                assert_eq!(layout.packed_range(b).start, entries);
                (weights, entries) = (layout.range(b).end, layout.packed_range(b).end);
            }
            assert_eq!((weights, entries), (len, layout.packed_len()));
        }
    }

    #[test]
    fn sizes_do_not_wrap() {
        assert!(Layout::new(10, 0).is_err());
        assert!(Layout::new(usize::MAX, usize::MAX).is_err());
        assert!(Layout::new(1 << 40, 1 << 20).is_ok());
        assert!(Layout::new(1 << 40, 1 << 40).is_err());
        // The square of the block size fits, that of its padded rows does not.
        let most = (1u64 << 32) as usize - 1;
        assert!(Layout::new(most, most).is_err());
        let layout = Layout::new(70, 64).expect("layout");
        for after in [2, 3, usize::MAX] {
            assert_eq!(layout.size(after), 0);
            assert_eq!(layout.range(after), 70..70);
            assert!(layout.packed_range(after).is_empty());
        }
    }
}
