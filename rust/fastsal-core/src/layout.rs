//! How a parameter of `d` weights is cut into blocks, and where a block's entries lie.
//!
//! A parameter is cut into consecutive blocks of `B` weights; the last may be shorter. The
//! statistics of a block of `b` weights are the upper triangle of its symmetric matrix, row by row:
//! entry `(i, j)`, `i <= j`, lies at `row_base(b, i) + j`.

/// A parameter's cut into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Number of weights, `d`.
    pub len: usize,
    /// Block size, `B >= 1`, never more than `d`.
    pub block: usize,
}

impl Layout {
    /// Cut `len` weights into blocks of `block`; a block larger than the parameter is the parameter.
    #[must_use]
    pub fn new(len: usize, block: usize) -> Self {
        Self { len, block: block.clamp(1, len.max(1)) }
    }

    /// Number of blocks, the short last one included.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.len.div_ceil(self.block)
    }

    /// Number of weights in block `b`.
    #[must_use]
    pub fn size(&self, b: usize) -> usize {
        self.block.min(self.len - b * self.block)
    }

    /// Length of the packed statistics of the whole parameter.
    #[must_use]
    pub fn packed_len(&self) -> usize {
        let full = self.len / self.block;
        full * triangle(self.block) + triangle(self.len % self.block)
    }

    /// Where block `b` begins in the packed statistics.
    #[must_use]
    pub fn packed_start(&self, b: usize) -> usize {
        b * triangle(self.block)
    }
}

/// Entries of the upper triangle of a `b × b` matrix.
#[must_use]
pub const fn triangle(b: usize) -> usize {
    b * (b + 1) / 2
}

/// Offset such that entry `(i, j)`, `i <= j`, of a packed `b × b` triangle lies at `row_base + j`.
#[must_use]
pub const fn row_base(b: usize, i: usize) -> usize {
    // i rows of lengths b, b-1, ... stand before; the row itself starts at column i.
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
        for (len, block) in [(1, 64), (64, 64), (65, 64), (1000, 64), (7, 1), (100, 1000)] {
            let layout = Layout::new(len, block);
            let sizes: Vec<_> = (0..layout.blocks()).map(|b| layout.size(b)).collect();
            assert_eq!(sizes.iter().sum::<usize>(), len);
            let packed: usize = sizes.iter().map(|&s| triangle(s)).sum();
            assert_eq!(packed, layout.packed_len());
        }
    }
}
