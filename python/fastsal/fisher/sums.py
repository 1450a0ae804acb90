"""The sums of one parameter: packed blocks, or the gradients themselves while they are few.

Axes: n samples, d weights of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsal._core as _core
from fastsal.fisher.parts import Part, evenly

if TYPE_CHECKING:
    from fastsal.utils.mapped_files import FileArrays

Array = NDArray[Any]

# Elements that are added at a time: what is made for them is small.
_CHUNK = 2**22

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def as_rows(gradients: Tensor) -> tuple[Array, str]:
    """Return `[n, d]` memory of gradients `[n, ...]` on the CPU, and the name of its type.

    A contiguous CPU tensor is not copied. NumPy has no bfloat16: 16-bit types travel as uint16.
    """
    rows = flat_rows(gradients.detach().cpu())
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    name = _DTYPES[rows.dtype]
    if rows.element_size() == 2:
        rows = rows.view(torch.uint16)
    return rows.numpy(), name


def flat_rows(rows: Tensor) -> Tensor:
    """Rows `[n, d]` of gradients `[n, ...]`; a parameter of no axes has one weight."""
    return rows.flatten(1) if rows.dim() > 1 else rows[:, None]


def is_supported(dtype: torch.dtype) -> bool:
    """Whether gradients of this type are taken."""
    return dtype in _DTYPES


@dataclass
class ParameterStatistics:
    """Sums over samples of one parameter's gradients.

    Up to `(B + 1) / 2` samples the gradients themselves take less memory than the packed blocks
    (and serve the dual form, for blocks wider than the samples are many); they are folded into
    blocks when more come.

    Attributes:
        shape: The parameter's shape.
        block_size: Weights of a block, at most `d`.
        dtype: float32 or float64, of everything kept.
        sums: `sum_n g_n` `[d]`.
        packed: `sum_n g_nb g_nbᵀ` of all blocks, upper triangles by rows, or None.
        rows: Gradients that are not in `packed`, each `[n, d]`.
        awaits_rows: Whether `rows` is memory that an addition is still to fill.
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
    ) -> ParameterStatistics:
        """Return the sums of no samples; `block_size` None is the whole parameter."""
        d = math.prod(shape)
        block = d if block_size is None else min(block_size, d)
        return cls(shape, max(1, block), dtype, np.zeros(d, dtype))

    @property
    def d(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def limit(self) -> int:
        """The most gradients that take no more memory than the packed blocks."""
        return (self.block_size + 1) // 2

    @property
    def nbytes(self) -> int:
        """Memory that the sums take."""
        packed = 0 if self.packed is None else self.packed.nbytes
        return packed + self.sums.nbytes + sum(rows.nbytes for rows in self.rows)

    @property
    def final_nbytes(self) -> int:
        """Memory that the sums take as packed blocks."""
        return self.dtype.itemsize * (_core.packed_len(self.d, self.block_size) + self.d)

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has come yet."""
        return self.packed is None and not self.rows

    def own(self) -> None:
        """Read what lies in a file, to be changed, into memory, in `dtype`."""
        if self.packed is not None and not self.packed.flags.writeable:
            self.packed = np.array(widened(self.packed))
        self.rows = [rows if rows.flags.writeable else np.array(rows) for rows in self.rows]

    def clear(self) -> None:
        """Back to the sums of no samples."""
        self.packed, self.rows = None, []
        self.sums[:] = 0

    def add(self, rows: Array, dtype: str, *, expected: int | None = None) -> None:
        """Add gradients `[n, d]`; `expected` is the number of samples to come in all, if known.

        Raises:
            _core.NonFiniteRowError: NaN or infinity; the sums may hold part of the rows.
        """
        self.own()
        if self.packed is None and max(self._held() + len(rows), expected or 0) <= self.limit:
            _core.check_finite(rows, dtype)
            # A copy: the memory belongs to the caller.
            self.rows.append(_converted(rows, dtype, self.dtype))
            self.sums += self.rows[-1].sum(axis=0, dtype=np.float64).astype(self.dtype)
            return
        self._fold_rows()
        self._accumulate(rows, dtype, self.sums)

    def add_sums(self, packed: Array, sums: Array) -> None:
        """Add packed blocks and sums that were made elsewhere."""
        self.own()
        own = self.fold()
        own += packed
        self.sums += sums

    def fold(self) -> Array:
        """Turn kept gradients into packed blocks; returns the blocks."""
        self._fold_rows()
        if self.packed is None:
            self.packed = np.zeros(_core.packed_len(self.d, self.block_size), self.dtype)
        return self.packed

    def _fold_rows(self) -> None:
        for rows in self.rows:
            # `sums` holds these rows already.
            self._accumulate(rows, rows.dtype.name, np.zeros_like(self.sums))
        self.rows = []

    def _accumulate(self, rows: Array, dtype: str, sums: Array) -> None:
        fresh = self.packed is None
        if self.packed is None:
            self.packed = np.empty(_core.packed_len(self.d, self.block_size), self.dtype)
        _core.accumulate(rows, dtype, self.block_size, self.packed, sums, fresh)

    def merge(self, other: ParameterStatistics, weight: float) -> None:
        """Add another's sums times `weight`; the other is left as it is."""
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
        """Keep the sums in a file; they are of no samples yet.

        Args:
            arrays: The file.
            samples: To come in one addition (by `merge_part`), if known; where the gradients
                themselves take less than blocks, those are kept.
        """
        self.sums = arrays.take((self.d,), self.dtype)
        if samples is not None and samples <= self.limit:
            self.rows = [arrays.take((samples, self.d), self.dtype)]
            self.awaits_rows = True
        else:
            self.packed = arrays.take((_core.packed_len(self.d, self.block_size),), self.dtype)

    def merge_part(
        self, other: ParameterStatistics, start: int, stop: int, release: Callable[[], None]
    ) -> None:
        """Add the sums of some weights, `start` a multiple of the block size; in small pieces.

        `release` is called after each: it gives back the memory of sums in a file.
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

    def part(self, start: int, stop: int) -> ParameterStatistics:
        """The sums of some weights, which share memory with these where they are packed.

        `start` is a multiple of the block size.
        """
        if stop - start == self.d:
            return self
        offset = partial(_core.packed_len, block_size=self.block_size)
        packed = None if self.packed is None else self.packed[offset(start) : offset(stop)]
        rows = [np.ascontiguousarray(rows[:, start:stop]) for rows in self.rows]
        block = min(self.block_size, stop - start)
        return ParameterStatistics(
            (stop - start,), block, self.dtype, self.sums[start:stop], packed, rows
        )

    def gradients(self) -> Array:
        """All kept gradients as one array `[n, d]`."""
        if len(self.rows) != 1:
            empty = [np.zeros((0, self.d), self.dtype)]
            self.rows = [np.concatenate(self.rows or empty)]
        return self.rows[0]

    def _held(self) -> int:
        return sum(len(rows) for rows in self.rows)


def widened(values: Array) -> Array:
    """Bfloat16 numbers, held as uint16, in float32; others as they are."""
    if values.dtype != np.uint16:
        return values
    wide: Array = (values.astype(np.uint32) << 16).view(np.float32)
    return wide


def _multiply(values: Array, factor: float) -> None:
    # By the factor in float64: rounded to float32 it would not be the one that samples get.
    np.multiply(values, factor, out=values, dtype=np.float64, casting="same_kind")


def _converted(rows: Array, dtype: str, to: np.dtype[Any]) -> Array:
    # In row order: the core refuses the order of an expanded tensor, which would be kept.
    if dtype == "bfloat16":
        return (rows.astype(np.uint32, order="C") << 16).view(np.float32).astype(to)
    if dtype == "float16":
        return rows.view(np.float16).astype(to, order="C")
    return rows.astype(to, order="C")
