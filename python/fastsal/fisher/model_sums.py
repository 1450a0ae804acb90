"""Sums over samples of the gradients of all parameters of a model, or of some parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import fastsal._core as _core
from fastsal.errors import (
    GradientOverflow,
    InvalidArgument,
    NonFiniteGradient,
    UnknownParameter,
)
from fastsal.fisher.block_memory import check_memory_of_block
from fastsal.fisher.checks import quoted
from fastsal.fisher.parts import (
    Part,
    Parts,
    by_key,
    cut,
    flat_mask,
    packed_bytes,
    shapes_of,
    uncut,
)
from fastsal.fisher.rows import Array, as_rows, widened
from fastsal.fisher.storage import Storage
from fastsal.fisher.sums import ParameterSums
from fastsal.utils.interrupts import uninterrupted
from fastsal.utils.mapped_files import FileArrays

Shapes = dict[str, tuple[int, ...]]

# How to avoid sums that overflow.
_CURE = "scale the loss down, or collect with precision='float64'"

# A parameter for the compiled core: packed sums, number of weights, samples, and the mask of the
# weights that take part, or None for all.
CoreParameter = tuple[Array, int, float, NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Origin:
    """The model that the sums of one rank are a part of.

    Attributes:
        parts: Parts of the model, by the keys of their sums.
        shapes: Name to shape, of the whole model.
    """

    parts: Parts
    shapes: Shapes


@dataclass
class ModelSums:
    """Sums of all parameters, and counts of what was added.

    Attributes:
        block_size: Weights of a block; None makes each parameter one block.
        precision: `"float32"` or `"float64"`, the type of the sums.
        parameters: Name to sums, in order.
        samples: Sum of the weights of all samples.
        rows_seen: Number of gradients added to each parameter.
        steps: Number of additions of at most `ROWS_PER_STEP` rows; rounding errors grow with it.
        stored_error: Relative error of entries that were rounded when they were stored.
        storage: Where the sums are stored.
        origin: The model that these sums are a part of; None if they are of a whole model.
    """

    block_size: int | None
    precision: str
    parameters: dict[str, ParameterSums]
    samples: float = 0.0
    rows_seen: int = 0
    steps: int = 0
    stored_error: float = 0.0
    storage: Storage = field(default_factory=Storage)
    origin: Origin | None = None

    @classmethod
    def empty(
        cls,
        shapes: Mapping[str, Sequence[int]],
        block_size: int | None,
        precision: str,
    ) -> ModelSums:
        """Return sums of no samples, in memory."""
        return cls(block_size, precision, _empty_parameters(shapes, block_size, precision))

    @property
    def shapes(self) -> Shapes:
        """Name to shape."""
        return {name: p.shape for name, p in self.parameters.items()}

    @property
    def itemsize(self) -> int:
        """Bytes of one entry."""
        return np.dtype(self.precision).itemsize

    @property
    def nbytes(self) -> int:
        """Memory of the sums, in bytes."""
        return sum(p.nbytes for p in self.parameters.values())

    @property
    def final_nbytes(self) -> int:
        """Memory of the sums once they are packed blocks, in bytes."""
        return sum(p.final_nbytes for p in self.parameters.values())

    @property
    def whole_samples(self) -> int | float:
        """`samples`, as an integer if it is one."""
        return int(self.samples) if self.samples.is_integer() else self.samples

    def __repr__(self) -> str:
        weights = sum(p.d for p in self.parameters.values())
        return (
            f"ModelSums({len(self.parameters)} parameters, {weights:,} weights, "
            f"block_size={self.block_size}, samples={self.whole_samples}, {self.precision})"
        )

    def check_samples(self) -> None:
        """Raise InvalidArgument if no sample has been added."""
        if self.samples <= 0:
            raise InvalidArgument("fisher has no samples; call update or collect first")

    # Adding samples.

    def add(self, name: str, gradients: Tensor, expected: int | None = None) -> None:
        """Add gradients `[n, *shape]` of one parameter.

        `count` must be called once all parameters have theirs.

        Args:
            name: The parameter.
            gradients: Its gradients.
            expected: Total number of samples that will be added, if known.

        Raises:
            NonFiniteGradient: NaN or infinity; names parameter and sample.
            GradientOverflow: The sums overflow; names parameter and sample.
        """
        rows, dtype = as_rows(gradients)
        self._naming(name, partial(self.parameters[name].add, rows, dtype, expected=expected))

    def add_rows(self, prepared: Mapping[str, tuple[Array, str]], n: int) -> None:
        """Add and count checked rows of all parameters, or nothing if an exception is raised.

        Args:
            prepared: Name to rows and the name of their type, as `as_rows` returns them.
            n: Number of rows of each parameter.

        Raises:
            NonFiniteGradient: NaN or infinity; names parameter and sample.
            GradientOverflow: The sums would overflow; names parameter and sample.
        """
        if not all(p.is_empty for p in self.parameters.values()):
            self._each(prepared, ParameterSums.check)
            # Sums in place cannot be taken back.
            with uninterrupted():
                self._each(prepared, partial(ParameterSums.add, is_checked=True))
                self.count(n)
            return
        # Sums of no samples can be reset, which saves the check beforehand.
        before = (self.samples, self.rows_seen, self.steps)
        try:
            self._each(prepared, ParameterSums.add)
            self.count(n)
        except BaseException:
            with uninterrupted():
                for p in self.parameters.values():
                    p.clear()
                self.samples, self.rows_seen, self.steps = before
            raise

    def count(self, n: int) -> None:
        """Count `n` samples that were added to every parameter."""
        self.samples += n
        self.rows_seen += n
        self.steps += -(-n // _core.ROWS_PER_STEP)

    def merge(self, other: ModelSums, weight: float) -> None:
        """Add the sums of `other` times `weight`; `other` is unchanged.

        Raises:
            GradientOverflow: The sums would overflow; they are unchanged.
        """
        for name, p in self.parameters.items():
            self.check_fits(name, p, other.parameters[name], weight)
            self.storage.release()
        with uninterrupted():
            for name, p in self.parameters.items():
                p.merge(other.parameters[name], weight)
                self.storage.release()
            self.count_merged(other, weight)

    @staticmethod
    def check_fits(name: str, p: ParameterSums, other: ParameterSums, weight: float) -> None:
        """Raise GradientOverflow if the sums of a parameter cannot take those of another."""
        if not p.fits(other, weight):
            raise GradientOverflow(
                f"sums of squared gradients must fit {p.dtype.name}, those of {name!r} would "
                f"overflow; nothing was added ({_CURE})"
            )

    def count_merged(self, other: ModelSums, weight: float) -> None:
        """Count the samples of `other`, each `weight` times."""
        self.samples += weight * other.samples
        self.rows_seen += other.rows_seen
        self.steps += other.steps + 1
        self.stored_error = max(self.stored_error, other.stored_error)

    def merge_parts(self, other: ModelSums, parts: Parts) -> None:
        """Add the sums of parts, by their keys.

        `count_parts` must be called once all parts of the model were added.
        """
        for key, part in parts.items():
            given = other.parameters[key]
            release = self.storage.release
            self.parameters[part.name].merge_part(given, part.start, part.stop, release)
            release()

    def count_parts(self, other: ModelSums) -> None:
        """Count the samples of parts, of which all have as many as `other`."""
        for p in self.parameters.values():
            p.awaits_rows = False
        self.samples += other.samples
        self.rows_seen += other.rows_seen
        self.steps += other.steps + 1

    def scale(self, factor: float, samples: float) -> None:
        """Multiply all sums by `factor`; `samples` is the number of samples that remains."""
        with uninterrupted():
            for p in self.parameters.values():
                p.scale(factor)
            self.samples = samples
            self.steps += 1

    # Parts of the model.

    def like(self, parts: Parts) -> ModelSums:
        """Return sums of parts, by their keys, of no samples and in memory."""
        fresh = ModelSums.empty(shapes_of(parts, self.shapes), self.block_size, self.precision)
        fresh.storage.view_bytes = self.storage.view_bytes
        return fresh

    def views(self, *, cuts: bool = True) -> Iterator[tuple[ModelSums, Parts]]:
        """Yield the sums of groups of parts, in order, each with its parts.

        Views share memory with these sums.

        Args:
            cuts: Whether to cut parameters that alone take more memory than a group.
        """
        cost = partial(packed_bytes, block_size=self.block_size, itemsize=self.itemsize)
        size = self.block_size if cuts else None
        groups = cut(self.shapes, size, cost, self.storage.view_bytes)
        for parts in groups or [[part] for part in uncut(self.shapes)]:
            yield self._view(parts), by_key(parts)
            self.storage.release()

    def _view(self, parts: Sequence[Part]) -> ModelSums:
        found = {part.key: self.parameters[part.name].part(part.start, part.stop) for part in parts}
        return replace(self, parameters=found, origin=None)

    def move_to_file(self, arrays: FileArrays, samples: int | None) -> None:
        """Allocate the sums, which have no samples yet, in a scratch file.

        Args:
            arrays: The file.
            samples: Number of samples that `merge_parts` will add at once, if known.
        """
        self.storage = replace(self.storage, scratch=arrays)
        for p in self.parameters.values():
            p.move_to(arrays, samples)

    # Sums for the compiled core.

    def packed(self, name: str) -> ParameterSums:
        """Return the sums of a parameter as packed blocks; kept gradients are not changed.

        Raises:
            UnknownParameter: There is no such parameter.
            InvalidArgument: There are no samples, or a block exceeds the memory of this machine.
        """
        if name not in self.parameters:
            raise UnknownParameter(f"name must be one of {quoted(self.parameters)}, got {name!r}")
        self.check_samples()
        p = self.parameters[name]
        if p.packed is not None:
            return p
        check_memory_of_block(name, p.block_size, self.itemsize)
        folded = ParameterSums(p.shape, p.block_size, p.dtype, p.sums.copy(), None, p.rows)
        folded.fold()
        return folded

    def for_core(self, p: ParameterSums, kept: NDArray[np.bool_] | None = None) -> CoreParameter:
        """Return packed sums of a parameter in the form that the compiled core requires."""
        if p.packed is None:
            raise InvalidArgument("sums must be packed blocks")  # an internal error
        return widened(p.packed), p.d, self.samples, kept

    def all_for_core(
        self, kept: Mapping[str, Tensor] | None = None
    ) -> tuple[list[CoreParameter], int]:
        """Return all parameters in the form that the compiled core requires, and the block size.

        Args:
            kept: Name to mask, True = takes part; None for all.
        """
        self.check_samples()
        folded = {name: self.packed(name) for name in self.parameters}
        found = [self.for_core(p, flat_mask(kept, name)) for name, p in folded.items()]
        longest = max(p.d for p in folded.values())
        return found, min(self.block_size or longest, longest)

    def _each(
        self,
        prepared: Mapping[str, tuple[Array, str]],
        call: Callable[[ParameterSums, Array, str], Any],
    ) -> None:
        for name, (rows, dtype) in prepared.items():
            self._naming(name, partial(call, self.parameters[name], rows, dtype))

    def _naming(self, name: str, call: Callable[[], Any]) -> None:
        """Call a function of rows of a parameter; its error names parameter, sample and weight."""
        try:
            call()
        except _core.NonFiniteRowError as error:
            value, place = self._place(name, error)
            raise NonFiniteGradient(
                f"gradients must be finite, got {value} for {place}; nothing was accumulated"
            ) from None
        except _core.LargeRowError as error:
            value, place = self._place(name, error)
            raise GradientOverflow(
                f"sums of squared gradients must fit {self.precision}, got a gradient of "
                f"{value:.2g} for {place}; nothing was accumulated ({_CURE})"
            ) from None

    def _place(self, name: str, error: Exception) -> tuple[float, str]:
        """Return the value that the core rejected, and its parameter, sample and weight."""
        row, column, value = error.args
        at = [int(i) for i in np.unravel_index(column, self.parameters[name].shape)]
        return value, f"{name!r}, sample {self.rows_seen + row}, at {at}"


def _empty_parameters(
    shapes: Mapping[str, Sequence[int]], block_size: int | None, precision: str
) -> dict[str, ParameterSums]:
    dtype = np.dtype(precision)
    return {n: ParameterSums.empty(tuple(s), block_size, dtype) for n, s in shapes.items()}
