//! Groups of `M` weights along the input axis of a parameter.

use crate::error::{Error, Result};

/// The largest group: every choice of its members is tried.
pub const LARGEST_GROUP: usize = 8;

/// A parameter `[outer, width, inner]` and its groups of `size` along the middle axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    outer: usize,
    width: usize,
    inner: usize,
    size: usize,
}

impl Groups {
    /// Cut a parameter `[outer, width, inner]` (output channels, input channels, kernel positions)
    /// into groups of `size` input channels; the last group of a row may be short.
    ///
    /// # Errors
    /// [`Error::Value`] when the shape has more weights than `usize` counts, or when `size` is not in
    /// 1..=8.
    pub fn new(shape: (usize, usize, usize), size: usize) -> Result<Self> {
        let (outer, width, inner) = shape;
        volume(shape)?;
        if size == 0 || size > LARGEST_GROUP {
            let got = size.to_string();
            return Err(Error::Value { what: "group size", got, expected: "in 1..=8" });
        }
        Ok(Self { outer, width, inner, size })
    }

    /// Number of weights of the parameter.
    #[must_use]
    pub fn len(&self) -> usize {
        self.outer * self.row()
    }

    /// Whether there are no weights.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Members of a group, `M`.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// From one member of a group to the next.
    pub(crate) fn step(&self) -> usize {
        self.inner
    }

    /// Number of weights in a row.
    pub(crate) fn row(&self) -> usize {
        self.width * self.inner
    }

    /// Number of groups in a row.
    pub(crate) fn per_row(&self) -> usize {
        self.width.div_ceil(self.size) * self.inner
    }

    /// The members of group `g` of a row, as places in the row.
    pub(crate) fn members(&self, g: usize) -> impl Iterator<Item = usize> + Clone {
        let (inner, first) = (self.inner, g / self.inner * self.size);
        let last = self.width.min(first + self.size);
        let at = g % inner;
        (first..last).map(move |w| w * inner + at)
    }

    /// Places in the parameter of the later members of the group of the weight at `place`.
    pub(crate) fn later(&self, place: usize) -> impl Iterator<Item = usize> {
        let w = place / self.inner % self.width;
        let left = self.width.min((w / self.size + 1) * self.size) - w;
        let inner = self.inner;
        (1..left).map(move |k| place + k * inner)
    }
}

/// Number of weights of a parameter `[outer, width, inner]`.
pub(crate) fn volume(shape: (usize, usize, usize)) -> Result<usize> {
    let (outer, width, inner) = shape;
    let volume = width.checked_mul(inner).and_then(|row| row.checked_mul(outer));
    volume.ok_or_else(|| Error::Value {
        what: "shape",
        got: format!("{shape:?}"),
        expected: "the shape of an array in memory",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_of_a_group_find_each_other() {
        let groups = Groups::new((2, 10, 3), 4).expect("groups");
        for g in 0..groups.per_row() {
            let members: Vec<usize> = groups.members(g).collect();
            for (k, at) in members.iter().enumerate() {
                assert_eq!(groups.later(*at).collect::<Vec<_>>(), members[k + 1..]);
            }
        }
    }

    #[test]
    fn sizes_do_not_wrap() {
        assert!(Groups::new((1 << 40, 1 << 40, 1), 4).is_err());
        assert!(Groups::new((0, 1, 1), 0).is_err() && Groups::new((1, 1, 1), 9).is_err());
    }
}
