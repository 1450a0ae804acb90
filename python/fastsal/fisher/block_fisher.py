"""The block-diagonal empirical Fisher of a model's parameters, as sums over samples.

`F_b = (1/N) sum_n g_nb g_nbᵀ` for each block `b` of `B` consecutive weights (row-major).
Damping is no part of it: one set of statistics serves every `λ`. Sources: Hassibi & Stork
(1993); WoodFisher (Singh & Alistarh, 2020), section 4, for the blocks.

Axes: n samples, d weights of a parameter, B weights of a block.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsal._core as _core
from fastsal.errors import (
    FactorizationError,
    InvalidArgument,
    NonFiniteGradient,
    UnknownParameter,
)
from fastsal.fisher import files as statistics_files
from fastsal.fisher.checks import _listed
from fastsal.fisher.inverses import InverseDiagonal, check_damping
from fastsal.fisher.parts import Part, Parts, by_key, cut, flat, packed_bytes, shapes_of, whole
from fastsal.fisher.sums import ParameterStatistics, as_rows, is_supported, widened
from fastsal.utils.mapped_files import FileArrays

if TYPE_CHECKING:
    from fastsal.fisher.memory_plan import MemoryPlan

# Sums that are worked on at a time: what is computed from them takes about as much again.
VIEW_BYTES = 2**28


class BlockFisher:
    """Sums of per-sample gradients of some parameters, cut into blocks.

    Args:
        shapes: Parameter name to shape.
        block_size: Weights of a block, `B`; None takes each whole parameter as one block.
        precision: `"float32"` or `"float64"`, in which sums are kept. Everything computed from
            them is computed in float64; see `inverse_diagonals` for the error of the sums.

    Raises:
        InvalidArgument: A shape, the block size or the precision is not taken.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        block_size: int | None = 64,
        precision: str = "float32",
    ) -> None:
        if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
            raise InvalidArgument(f"block_size: got {block_size!r}; takes 1 or more, or None")
        if precision not in ("float32", "float64"):
            raise InvalidArgument(f"precision: got {precision!r}; takes 'float32' or 'float64'")
        if not shapes:
            raise InvalidArgument("shapes: is empty; takes parameter name to shape")
        for name, shape in shapes.items():
            if math.prod(shape) < 1 or any(n < 0 for n in shape):
                raise InvalidArgument(f"shapes: {name!r} has shape {tuple(shape)}, no weights")
        self._block_size = block_size
        self._precision = precision
        self._samples = 0.0
        self._rows_seen = 0
        # Additions to the sums, of up to ROWS_PER_STEP rows each; rounding grows with these.
        self._steps = 0
        # The file that the sums lie in, or None for memory.
        self._arrays: FileArrays | None = None
        # How they were collected within a memory budget.
        self._plan: MemoryPlan | None = None
        # Parts of every rank of a job, where these are statistics of one of them.
        self._shares: list[list[Part]] | None = None
        self._whole: dict[str, tuple[int, ...]] | None = None  # shapes, of the whole model
        # Arrays that are read from files as they are used, and what those are of.
        self._mapped: list[NDArray[Any]] = []
        self._stored_parts: Parts | None = None
        # Relative error of entries that were rounded when they were stored.
        self._stored_error = 0.0
        # Packed sums that are worked on at a time.
        self._view_bytes = VIEW_BYTES
        dtype = np.dtype(precision)
        self._parameters = {
            name: ParameterStatistics.empty(tuple(shape), block_size, dtype)
            for name, shape in shapes.items()
        }

    @property
    def samples(self) -> int | float:
        """Samples summed: the sum of their weights, a fraction after `decay` or a weighted `merge`.

        It is what sums are divided by, so that `F_b` stays a mean. The gradients that were summed
        are as many or more, and their spread is that of fewer where weights differ.
        """
        return int(self._samples) if self._samples.is_integer() else self._samples

    @property
    def block_size(self) -> int | None:
        """Weights of a block, or None for whole parameters."""
        return self._block_size

    @property
    def precision(self) -> str:
        """`"float32"` or `"float64"`."""
        return self._precision

    @property
    def names(self) -> list[str]:
        """Parameter names, in order."""
        return list(self._parameters)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""
        return {name: p.shape for name, p in self._parameters.items()}

    @property
    def final_nbytes(self) -> int:
        """Memory that the sums take once all samples are in packed blocks."""
        return sum(p.final_nbytes for p in self._parameters.values())

    @property
    def nbytes(self) -> int:
        """Memory that the statistics take, in bytes."""
        return sum(p.nbytes for p in self._parameters.values())

    def __repr__(self) -> str:
        weights = sum(p.d for p in self._parameters.values())
        return (
            f"BlockFisher({len(self._parameters)} parameters, {weights:,} weights, "
            f"block_size={self._block_size}, samples={self.samples}, {self._precision})"
        )

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of some samples, for all parameters.

        Args:
            gradients: Name to `[n, *shape]`, float32, float16, bfloat16 or float64; all
                parameters, the same `n >= 1` samples.

        Raises:
            UnknownParameter: A name is missing or not one of `names`.
            InvalidArgument: A shape or type does not fit.
            NonFiniteGradient: NaN or infinity; names parameter and sample. In every case
                nothing was accumulated.
        """
        self._check_names("gradients", gradients)
        prepared = {}
        counts = set()
        for name, value in gradients.items():
            tensor = torch.as_tensor(value)
            shape = self._parameters[name].shape
            if tensor.dim() != len(shape) + 1 or tuple(tensor.shape[1:]) != shape:
                raise InvalidArgument(
                    f"gradients: {name!r} has shape {tuple(tensor.shape)}; "
                    f"takes [n, {', '.join(map(str, shape))}]"
                )
            if not is_supported(tensor.dtype):
                raise InvalidArgument(
                    f"gradients: {name!r} is {tensor.dtype}; takes float32, float16, bfloat16 "
                    "or float64"
                )
            counts.add(tensor.shape[0])
            prepared[name] = as_rows(tensor)
        if len(counts) != 1 or 0 in counts:
            raise InvalidArgument(
                f"gradients: got {sorted(counts)} samples; takes the same number, 1 or more, "
                "for every parameter"
            )
        if all(p.is_empty for p in self._parameters.values()):
            # Sums of nothing can be thrown away; they need no check beforehand.
            try:
                self._add_all(prepared)
            except NonFiniteGradient:
                for p in self._parameters.values():
                    p.clear()
                raise
        else:
            for name, (rows, dtype) in prepared.items():
                self._named(name, partial(_core.check_finite, rows, dtype))
            self._add_all(prepared)
        self._count(counts.pop())

    def blocks(self, name: str) -> Tensor:
        """Return `F_b` of all blocks, `[n_blocks, B, B]` float64.

        The last block of a parameter may be short; it is padded with zeros.
        """
        p = self._packed(name)
        size = p.block_size
        dense = _core.blocks(self._borrow(p), size).reshape(-1, size, size)
        out = torch.from_numpy(dense)
        missing = (self._block_size or size) - size
        return torch.nn.functional.pad(out, (0, missing, 0, missing)) if missing else out

    def diagonal(self) -> dict[str, Tensor]:
        """Return the mean squared gradients, name to the parameter's shape, float64."""
        self._check_samples()
        result = {}
        for name, p in self._parameters.items():
            if p.packed is None:
                rows = p.gradients().astype(np.float64, copy=False)
                flat = np.einsum("nd,nd->d", rows, rows) / self._samples
            else:
                flat = _core.diagonal(self._borrow(p), p.block_size)
            result[name] = torch.from_numpy(flat).reshape(p.shape)
            self._release()
        return result

    def mean_gradient(self) -> dict[str, Tensor]:
        """Return the mean gradient of every weight, name to the parameter's shape, float64."""
        self._check_samples()
        return {
            name: torch.from_numpy(p.sums.astype(np.float64) / self._samples).reshape(p.shape)
            for name, p in self._parameters.items()
        }

    def inverse_diagonals(
        self, damping: float, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, InverseDiagonal]:
        """Return `diag((F_b + λI)⁻¹)` of every parameter, with a bound of its relative error.

        The bound: summed in `S` steps of up to 128 samples (`N/128`, more for smaller updates) with
        unit roundoff `u` (2⁻²⁴ for float32), an entry `F_ij` has an error of at most
        `ε √(F_ii F_jj)`, `ε = u (√128 + √S)`, with high probability (Higham & Mary, 2019,
        section 2: independent roundings grow with the root of their number): 2.3e-6 at
        `N = 100,000`. Rows of 16 bits add nothing to it, as the product of two such numbers is
        exact in float32; their own rounding is that of the gradients. Such errors move `diag(A⁻¹)`
        by at most `ε max_i F_ii ‖A⁻¹‖` relatively. Float64 itself adds
        `B 2⁻⁵³ max_i F_ii ‖A⁻¹‖`.

        Args:
            damping: `λ`, above zero.
            kept: Name to mask, True = still in the model when the statistics were collected;
                other weights take no part.

        Raises:
            InvalidArgument: `damping` is not a finite number above zero, or there are no samples.
        """
        self._check_samples()
        check_damping(damping)
        result: dict[str, InverseDiagonal] = {}
        primal: dict[int | None, list[str]] = {}
        for name, p in self._parameters.items():
            if p.packed is None:
                values, failed, sensitivity = _core.dual_inverse_diagonal(
                    p.gradients(),
                    self._precision,
                    p.block_size,
                    self._samples,
                    flat_mask(kept, name),
                    damping,
                )
                errors = sensitivity * (len(p.gradients()) * 2.0**-53)
                result[name] = InverseDiagonal(values, failed, errors)
            else:
                primal.setdefault(self._block_size, []).append(name)
        for names in primal.values():
            size = self._block_size or max(self._parameters[n].d for n in names)
            borrowed = [self._borrow(self._parameters[n], flat_mask(kept, n)) for n in names]
            inverses = _core.inverse_diagonal(borrowed, size, damping)
            for name, (values, failed, sensitivity) in zip(names, inverses, strict=True):
                errors = self._error_bound(name, sensitivity)
                result[name] = InverseDiagonal(values, failed, errors)
        return {name: result[name] for name in self._parameters}

    def merge(self, other: BlockFisher, weight: float = 1.0) -> None:
        """Add another's sums times `weight`: more samples, or a mixture of sources.

        Args:
            other: Statistics of the same parameters and block size. It is left as it is.
            weight: What one sample of `other` counts, above zero.

        Raises:
            InvalidArgument: The two do not fit, or the weight is not a finite number above zero.
        """
        self._check_fits(other, weight)
        for name, p in self._parameters.items():
            p.merge(other._parameters[name], float(weight))
            self._release()
        self._count_merged(other, weight)

    def _check_fits(self, other: BlockFisher, weight: float) -> None:
        if not (isinstance(weight, (int, float)) and weight > 0 and math.isfinite(weight)):
            raise InvalidArgument(f"weight: got {weight!r}; takes a finite number above zero")
        if other.shapes != self.shapes or other.block_size != self.block_size:
            raise InvalidArgument(
                "other: has other parameters, shapes or block size "
                f"({other!r} into {self!r}); takes statistics of the same model"
            )

    def _count_merged(self, other: BlockFisher, weight: float) -> None:
        self._samples += float(weight) * other._samples
        self._rows_seen += other._rows_seen
        self._steps += other._steps + 1
        self._stored_error = max(self._stored_error, other._stored_error)

    def decay(self, factor: float) -> None:
        """Let the samples so far count `factor` times: statistics of a stream that forget.

        `fisher.decay(0.9); fisher.merge(collect(model, new))` for each new part of a stream is the
        exponentially weighted sum, in which a part of k steps ago counts `0.9^k`. `samples` shrinks
        by the same factor; `blocks` and everything else that is a mean stay as they are until more
        samples come.

        Args:
            factor: Above zero, to 1.

        Raises:
            InvalidArgument: `factor` is out of range, or so small that the samples come to nothing;
                the statistics are as they were.
        """
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not (is_number and 0 < factor <= 1):
            raise InvalidArgument(f"factor: got {factor!r}; takes a number above zero, to 1")
        left = self._samples * factor
        # Sums that would sink below what the type holds.
        if self._samples > 0 and left < np.finfo(self._precision).tiny:
            raise InvalidArgument(f"factor: {factor!r} leaves {left:g} samples; start afresh")
        for p in self._parameters.values():
            p.scale(float(factor))
        self._samples = left
        self._steps += 1

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        shard_bytes: int | str | None = None,
    ) -> None:
        """Write everything to a safetensors file, whole or not at all; in small pieces.

        Args:
            path: The file; with `shard_bytes`, an index in JSON beside its shards.
            dtype: `"bfloat16"` halves the file. It rounds every entry of `F_b` by up to 2⁻⁹ of it,
                which is told with the error of scores, and needs a `λ` of about that part of the
                largest eigenvalue, or blocks are not positive definite. None keeps the sums.
            shard_bytes: Most bytes of a shard, or text as `"4GiB"`; a parameter is not cut.

        Raises:
            InvalidArgument: An argument is not taken.
            OSError: The disk is full, or the folder cannot be written.
        """
        statistics_files.write(self, path, dtype=dtype, shard_bytes=shard_bytes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> BlockFisher:
        """Read what `save` wrote; sums stay in the file until they are used.

        Scores, eliminations and compensation work on it piece by piece. What is changed, by
        `update`, `merge` or `decay`, is read into memory.

        Args:
            path: A file, or an index of shards.
            verify: Whether everything is read once, to compare it with the digest.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: It is truncated, tampered with, or something else.
        """
        return statistics_files.read(path, verify=verify)

    # What follows serves the other modules of the package.

    def _add(self, name: str, gradients: Tensor, expected: int | None) -> None:
        """Add one parameter's gradients; `_count` follows when all parameters have theirs."""
        rows, dtype = as_rows(gradients)
        p = self._parameters[name]
        self._named(name, partial(p.add, rows, dtype, expected=expected))

    def _add_all(self, prepared: Mapping[str, tuple[NDArray[Any], str]]) -> None:
        for name, (rows, dtype) in prepared.items():
            self._named(name, partial(self._parameters[name].add, rows, dtype))

    def _count(self, n: int) -> None:
        self._samples += n
        self._rows_seen += n
        self._steps += -(-n // _core.ROWS_PER_STEP)

    def _named(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except _core.NonFiniteRowError as error:
            row, column, value = error.args
            at = np.unravel_index(column, self._parameters[name].shape)
            raise NonFiniteGradient(
                f"gradients: {name!r} is {value} for sample {self._rows_seen + row} at "
                f"{[int(i) for i in at]}; takes finite gradients (nothing was accumulated)"
            ) from None

    def _views(self, *, cuts: bool = True) -> Iterator[tuple[BlockFisher, Parts]]:
        """The statistics in groups of parts, with which they share memory, in order.

        Args:
            cuts: Whether parameters that alone take more than a group are cut.
        """
        cost = partial(packed_bytes, block_size=self._block_size, itemsize=self._itemsize)
        size = self._block_size if cuts else None
        groups = cut(self.shapes, size, cost, self._view_bytes)
        for parts in groups or [[part] for part in whole(self.shapes)]:
            yield self._view(parts), by_key(parts)
            self._release()

    def _empty(self, parts: Parts) -> BlockFisher:
        """Statistics of parts, of no samples yet and in memory."""
        fresh = copy.copy(self)
        fresh._samples, fresh._rows_seen, fresh._steps = 0.0, 0, 0
        fresh._arrays, fresh._plan, fresh._mapped = None, None, []
        dtype = np.dtype(self._precision)
        fresh._parameters = {
            key: ParameterStatistics.empty(shape, self._block_size, dtype)
            for key, shape in shapes_of(parts, self.shapes).items()
        }
        return fresh

    def _view(self, parts: Sequence[Part]) -> BlockFisher:
        view = copy.copy(self)
        view._parameters = {
            part.key: self._parameters[part.name].part(part.start, part.stop) for part in parts
        }
        return view

    def _finish(self) -> None:
        """Bring a use that failed to its end; there is something to do where sums are made anew."""

    def _sums_of(self, name: str) -> ParameterStatistics:
        """The sums of a parameter, to be written."""
        return self._parameters[name]

    def _squares(self) -> tuple[float, int]:
        """The sum of the mean squared gradients, and the number of weights."""
        total, count = 0.0, 0
        for statistics, _ in self._views():
            for squares in statistics.diagonal().values():
                total, count = total + float(squares.sum()), count + squares.numel()
        return total, count

    def _release(self) -> None:
        """Give back the memory of sums that lie in a file."""
        if self._arrays is not None:
            self._arrays.release()
        if self._mapped:
            statistics_files.forget(self._mapped)

    def _move_to(self, arrays: FileArrays, samples: int | None) -> None:
        """Keep the sums, of no samples yet, in a file."""
        self._arrays = arrays
        for p in self._parameters.values():
            p.move_to(arrays, samples)

    def _merge_parts(self, other: BlockFisher, parts: Parts) -> None:
        """Add the sums of parts, by their keys; `_count_of` follows when all have been added."""
        for key, part in parts.items():
            given = other._parameters[key]
            self._parameters[part.name].merge_part(given, part.start, part.stop, self._release)
            self._release()

    def _count_of(self, other: BlockFisher) -> None:
        for p in self._parameters.values():
            p.awaits_rows = False
        self._samples += other._samples
        self._rows_seen += other._rows_seen
        self._steps += other._steps + 1

    @property
    def _itemsize(self) -> int:
        return np.dtype(self._precision).itemsize

    def _packed(self, name: str) -> ParameterStatistics:
        """The statistics of a parameter, folded into blocks without changing what is kept."""
        if name not in self._parameters:
            raise UnknownParameter(f"name: {name!r} is none of {_listed(self._parameters)}")
        self._check_samples()
        p = self._parameters[name]
        if p.packed is not None:
            return p
        copy = ParameterStatistics(p.shape, p.block_size, p.dtype, p.sums.copy(), None, p.rows)
        copy.fold()
        return copy

    def _borrow(
        self, p: ParameterStatistics, kept: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[Any], int, float, NDArray[np.bool_] | None]:
        """A parameter as the core takes it."""
        if p.packed is None:
            raise InvalidArgument("statistics: are not folded")  # a defect of ours
        return widened(p.packed), p.d, self._samples, kept

    def _borrow_all(
        self, kept: Mapping[str, Tensor] | None
    ) -> tuple[list[tuple[NDArray[Any], int, float, NDArray[np.bool_] | None]], int]:
        """All parameters folded, as the core takes them, and the block size."""
        self._check_samples()
        folded = {name: self._packed(name) for name in self._parameters}
        borrowed = [self._borrow(p, flat_mask(kept, name)) for name, p in folded.items()]
        return borrowed, self._block_size or max(p.d for p in folded.values())

    def _error_bound(self, name: str, sensitivity: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bound of the relative error of a parameter's inverses (see `inverse_diagonals`)."""
        double = self._parameters[name].block_size * 2.0**-53
        return sensitivity * (self._rounding() + double)

    def _rounding(self) -> float:
        """`ε` of `inverse_diagonals`: bound of the relative error of the sums."""
        unit = 2.0**-24 if self._precision == "float32" else 2.0**-53
        summed = unit * (math.sqrt(_core.ROWS_PER_STEP) + math.sqrt(self._steps))
        return summed + self._stored_error

    def _check_samples(self) -> None:
        if self._samples <= 0:
            raise InvalidArgument("fisher: holds no samples yet; call update or collect first")

    def _check_names(self, argument: str, given: Iterable[str]) -> None:
        given = set(given)
        missing = [name for name in self._parameters if name not in given]
        unknown = sorted(given - self._parameters.keys())
        if missing or unknown:
            said = f"misses {_listed(missing)}" if missing else f"has unknown {_listed(unknown)}"
            raise UnknownParameter(f"{argument}: {said}; takes {_listed(self._parameters)}")


def flat_mask(masks: Mapping[str, Tensor] | None, name: str) -> NDArray[np.bool_] | None:
    """A parameter's mask `[d]` as NumPy, or None."""
    if masks is None or name not in masks:
        return None
    return flat(masks[name]).numpy()


def raise_failed(name: str, failed: list[int], damping: float) -> None:
    """Raise FactorizationError when blocks of a parameter failed."""
    if failed:
        listed = ", ".join(map(str, failed[:5])) + (", ..." if len(failed) > 5 else "")
        raise FactorizationError(
            f"damping: {len(failed)} blocks of {name!r} ({listed}) are not positive definite with "
            f"λ = {damping:g}; takes a larger λ (gradients near the float32 range also do this: "
            "collect with precision='float64')"
        )
