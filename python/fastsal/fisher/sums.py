"""Sums over samples of one parameter: packed blocks, or the gradients of the first few samples.

Axes: n samples, d weights of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import fastsal._core as _core
from fastsal.fisher.parts import Part, evenly
from fastsal.fisher.rows import Array, converted_rows, widened

if TYPE_CHECKING:
    from fastsal.utils.mapped_files import FileArrays

# Elements added at a time, which bounds temporary arrays.
_CHUNK = 2**22
# Sums never overflow from gradients below these, whatever they hold: 2⁴⁰ such squares are less than
# half a unit in the last place of the largest number, and adding them to it changes nothing.
HARMLESS = {"float32": 2.0**31, "float64": 2.0**460}
# The largest part of a type's range that sums may take; sums are rounded.
_MOST = 0.99


@dataclass
class ParameterSums:
    """Sums over samples of one parameter's gradients.

    Up to `(B + 1) / 2` samples, the gradients take less memory than the packed blocks. They are
    kept, which allows the dual form for blocks wider than the number of samples. They are folded
    into blocks when more samples are added.

    Attributes:
        shape: The parameter's shape.
        block_size: Weights of a block, at most `d`.
        dtype: float32 or float64, the type of every array.
        sums: `sum_n g_n` `[d]`.
        packed: `sum_n g_nb g_nbᵀ` of all blocks, upper triangles in row order, or None.
        rows: Gradients not yet in `packed`, each `[n, d]`.
        awaits_rows: Whether `rows` is allocated memory that `merge_part` is still to fill.
    """

    shape: tuple[int, ...]
    block_size: int
    dtype: np.dtype[Any]
    sums: Array
    packed: Array | None = None
    rows: list[Array] = field(default_factory=list)
    awaits_rows: bool = False

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], block_size: int | None, dtype: np.dtype[Any]
    ) -> ParameterSums:
        """Return sums of no samples; `block_size` None makes the parameter one block."""
        d = math.prod(shape)
        block = d if block_size is None else min(block_size, d)
        return cls(shape, max(1, block), dtype, np.zeros(d, dtype))

    @property
    def d(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def limit(self) -> int:
        """Largest number of gradients that take no more memory than the packed blocks."""
        return (self.block_size + 1) // 2

    @property
    def nbytes(self) -> int:
        """Memory of the sums, in bytes."""
        packed = 0 if self.packed is None else self.packed.nbytes
        return packed + self.sums.nbytes + sum(rows.nbytes for rows in self.rows)

    @property
    def final_nbytes(self) -> int:
        """Memory of the sums as packed blocks, in bytes."""
        return self.dtype.itemsize * (_core.packed_len(self.d, self.block_size) + self.d)

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has been added."""
        return self.packed is None and not self.rows

    def own(self) -> None:
        """Copy arrays of a read-only file into memory, in `dtype`, before they are changed."""
        if self.packed is not None and not self.packed.flags.writeable:
            self.packed = np.array(widened(self.packed))
        self.rows = [rows if rows.flags.writeable else np.array(rows) for rows in self.rows]

    def clear(self) -> None:
        """Reset to sums of no samples."""
        self.packed, self.rows = None, []
        self.sums[:] = 0

    def check(self, rows: Array, dtype: str) -> None:
        """Check that gradients `[n, d]` can be added.

        Raises:
            _core.NonFiniteRowError: NaN or infinity.
            _core.LargeRowError: The sums would overflow.
        """
        if _core.largest(rows, dtype) < HARMLESS[self.dtype.name]:
            return
        most = _MOST * float(np.finfo(self.dtype).max)
        before, step = self._squares(), max(1, _CHUNK // len(rows))
        for start in range(0, self.d, step):
            some = slice(start, start + step)
            added = converted_rows(rows[:, some], dtype, np.dtype(np.float64))
            with np.errstate(over="ignore"):
                after = before[some] + np.einsum("nd,nd->d", added, added)
            large = np.flatnonzero(~(after <= most))
            if len(large):
                values = added[:, large[0]]
                row = int(np.abs(values).argmax())
                raise _core.LargeRowError(row, start + int(large[0]), float(values[row]))

    def add(
        self,
        rows: Array,
        dtype: str,
        *,
        expected: int | None = None,
        is_checked: bool = False,
    ) -> None:
        """Add gradients `[n, d]`.

        Args:
            rows: The gradients, as `as_rows` returns them.
            dtype: Name of their type.
            expected: Total number of samples that will be added, if known.
            is_checked: Whether `check` has accepted them.

        Raises:
            _core.NonFiniteRowError: NaN or infinity; some of the rows may have been added.
            _core.LargeRowError: The sums overflow; some of the rows may have been added.
        """
        self.own()
        if self.packed is None and max(self._held() + len(rows), expected or 0) <= self.limit:
            if not is_checked:
                self.check(rows, dtype)
            # A copy: the memory belongs to the caller.
            self.rows.append(converted_rows(rows, dtype, self.dtype))
            self.sums += self.rows[-1].sum(axis=0, dtype=np.float64).astype(self.dtype)
            return
        self._fold_rows()
        self._accumulate(rows, dtype, self.sums)

    def add_sums(self, packed: Array, sums: Array) -> None:
        """Add packed blocks and sums accumulated elsewhere, which are not used there any more."""
        if self.is_empty and packed.dtype == self.dtype and packed.flags.writeable:
            self.packed = packed  # of a whole model, a copy takes seconds
        else:
            self.own()
            own = self.fold()
            own += packed
        self.sums += sums

    def fold(self) -> Array:
        """Fold kept gradients into packed blocks, and return the blocks."""
        self._fold_rows()
        if self.packed is None:
            self.packed = np.zeros(_core.packed_len(self.d, self.block_size), self.dtype)
        return self.packed

    def _fold_rows(self) -> None:
        for rows in self.rows:
            # `sums` already includes these rows.
            self._accumulate(rows, rows.dtype.name, np.zeros_like(self.sums))
        self.rows = []

    def _accumulate(self, rows: Array, dtype: str, sums: Array) -> None:
        packed, fresh = self.packed, self.packed is None
        if packed is None:
            packed = np.empty(_core.packed_len(self.d, self.block_size), self.dtype)
        _core.accumulate(rows, dtype, self.block_size, packed, sums, fresh)
        self.packed = packed

    def _squares(self) -> Array:
        """Return the sums of squares `[d]`, float64."""
        if self.packed is None:
            squares = np.zeros(self.d)
        else:
            given = (widened(self.packed), self.d, 1.0, None)
            squares = _core.diagonal(given, self.block_size)
        for rows in self.rows:
            squares += np.einsum("nd,nd->d", rows, rows, dtype=np.float64)
        return squares

    def fits(self, other: ParameterSums, weight: float) -> bool:
        """Tell whether the sums of `other` times `weight` can be added without overflow.

        Sums that add up to nearly the largest number of the type may be refused, too.
        """
        return self._most() + weight * other._most() <= _MOST * float(np.finfo(self.dtype).max)

    def _most(self) -> float:
        """Return a bound of the sums of squares, and so of every entry; NaN if one is NaN."""
        most = 0.0
        if self.packed is not None:
            for start in range(0, len(self.packed), _CHUNK):
                most = max(most, float(widened(self.packed[start : start + _CHUNK]).max()))
        for rows in self.rows:
            most += len(rows) * float(np.abs(rows).max(initial=0)) ** 2
        return most

    def merge(self, other: ParameterSums, weight: float) -> None:
        """Add the sums of `other` times `weight`; `other` is unchanged."""
        self.own()
        scale = self.dtype.type(weight)
        self.sums += scale * other.sums.astype(self.dtype, copy=False)
        root = self.dtype.type(math.sqrt(weight))
        rows = [root * rows.astype(self.dtype, copy=False) for rows in other.rows]
        theirs = other.packed  # before folding, as the other may be this one
        both_dual = self.packed is None and theirs is None
        if both_dual and self._held() + other._held() <= self.limit:
            self.rows += rows
            return
        self.rows += rows
        packed = self.fold()
        if theirs is not None:
            for start in range(0, len(packed), _CHUNK):
                some = slice(start, start + _CHUNK)
                packed[some] += scale * widened(theirs[some]).astype(self.dtype, copy=False)

    def move_to(self, arrays: FileArrays, samples: int | None) -> None:
        """Allocate the sums, which have no samples yet, in a file.

        Args:
            arrays: The file.
            samples: Number of samples that `merge_part` will add at once, if known. Gradients are
                kept where they take less memory than blocks.
        """
        self.sums = arrays.take((self.d,), self.dtype)
        if samples is not None and samples <= self.limit:
            self.rows = [arrays.take((samples, self.d), self.dtype)]
            self.awaits_rows = True
        else:
            self.packed = arrays.take((_core.packed_len(self.d, self.block_size),), self.dtype)

    def merge_part(
        self, other: ParameterSums, start: int, stop: int, release: Callable[[], None]
    ) -> None:
        """Add the sums of weights `start` to `stop`, in small pieces.

        Args:
            other: Sums of these weights.
            start: First weight, a multiple of the block size.
            stop: One past the last weight.
            release: Called after each piece; releases cached pages of a file.
        """
        if self.awaits_rows:
            self.sums[start:stop] = other.sums
            for number, row in enumerate(row for rows in other.rows for row in rows):
                self.rows[0][number, start:stop] = row
                release()
            return
        self.own()
        if self.packed is None and stop - start == self.d:
            self.merge(other, 1.0)
            return
        self.fold()
        count = -(-(stop - start) * (self.block_size + 1) // (2 * _CHUNK))
        for piece in evenly(Part("", start, stop, self.d), count, self.block_size):
            theirs = other.part(piece.start - start, piece.stop - start)
            self.part(piece.start, piece.stop).merge(theirs, 1.0)
            release()

    def scale(self, factor: float) -> None:
        """Multiply the sums by `factor`."""
        self.own()
        _multiply(self.sums, factor)
        if self.packed is not None:
            _multiply(self.packed, factor)
        for rows in self.rows:
            _multiply(rows, math.sqrt(factor))

    def part(self, start: int, stop: int) -> ParameterSums:
        """Return the sums of weights `start` to `stop`; packed blocks share memory with these.

        `start` must be a multiple of the block size.
        """
        if stop - start == self.d:
            return self
        offset = partial(_core.packed_len, block_size=self.block_size)
        packed = None if self.packed is None else self.packed[offset(start) : offset(stop)]
        rows = [np.ascontiguousarray(rows[:, start:stop]) for rows in self.rows]
        block = min(self.block_size, stop - start)
        return ParameterSums(
            (stop - start,), block, self.dtype, self.sums[start:stop], packed, rows
        )

    def gradients(self) -> Array:
        """Return all kept gradients as one array `[n, d]`."""
        if len(self.rows) != 1:
            empty = [np.zeros((0, self.d), self.dtype)]
            self.rows = [np.concatenate(self.rows or empty)]
        return self.rows[0]

    def _held(self) -> int:
        return sum(len(rows) for rows in self.rows)


def _multiply(values: Array, factor: float) -> None:
    # In float64, so that the factor is exactly the one applied to the number of samples.
    np.multiply(values, factor, out=values, dtype=np.float64, casting="same_kind")
