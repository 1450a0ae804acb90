"""The block-diagonal empirical Fisher of a model's parameters, as sums over samples.

`F_b = (1/N) sum_n g_nb g_nbᵀ` for each block `b` of `B` consecutive weights (row-major). The sums
do not depend on the damping `λ`, so that one set of statistics serves every `λ`. Sources: Hassibi &
Stork (1993); WoodFisher (Singh & Alistarh, 2020), section 4, for the blocks.

Axes: n samples, d weights of a parameter, B weights of a block.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsal._core as _core
from fastsal.errors import GradientOverflow, InvalidArgument
from fastsal.fisher import files, inverses
from fastsal.fisher.checks import (
    check_block_size,
    check_damping,
    check_precision,
    check_shapes,
    checked_rows,
)
from fastsal.fisher.inverses import InverseDiagonal
from fastsal.fisher.model_sums import ModelSums
from fastsal.utils.numbers import real


class BlockFisher:
    """Sums over samples of the gradients of some parameters, cut into blocks.

    Args:
        shapes: Parameter name to shape.
        block_size: Weights of a block, `B`; None makes each parameter one block.
        precision: `"float32"` or `"float64"`, the type of the sums. Everything computed from them
            is computed in float64; see `inverse_diagonals` for the error of the sums.

    Raises:
        InvalidArgument: A shape, the block size or the precision is invalid.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        block_size: int | None = 64,
        precision: str = "float32",
    ) -> None:
        block_size, precision = check_block_size(block_size), check_precision(precision)
        check_shapes(shapes)
        self._sums = ModelSums.empty(shapes, block_size, precision)

    @property
    def samples(self) -> int | float:
        """Number of samples: the sum of their weights, a fraction after `decay` or `merge`.

        Sums are divided by it, so that `F_b` is a mean. Where weights differ, the number of
        gradients that were summed is larger.
        """
        return self._sums.whole_samples

    @property
    def block_size(self) -> int | None:
        """Weights of a block; None if each parameter is one block."""
        return self._sums.block_size

    @property
    def precision(self) -> str:
        """Type of the sums, `"float32"` or `"float64"`."""
        return self._sums.precision

    @property
    def names(self) -> list[str]:
        """Parameter names, in order."""
        return list(self._sums.parameters)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""
        return self._sums.shapes

    @property
    def final_nbytes(self) -> int:
        """Memory of the sums once all samples are in packed blocks, in bytes."""
        return self._sums.final_nbytes

    @property
    def nbytes(self) -> int:
        """Memory of the sums, in bytes."""
        return self._sums.nbytes

    def __repr__(self) -> str:
        return repr(self._sums).replace("ModelSums", "BlockFisher", 1)

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of some samples, for all parameters.

        Args:
            gradients: Name to `[n, *shape]`, float32, float16, bfloat16 or float64, for all
                parameters and the same `n >= 1` samples.

        Raises:
            UnknownParameter: A name is missing or not one of `names`.
            InvalidArgument: A shape or a type is wrong, or the numbers of samples differ.
            NonFiniteGradient: NaN or infinity; names parameter and sample.
            GradientOverflow: The sums of squares would overflow; names parameter and sample. In
                every case nothing was accumulated.
        """
        rows, n = checked_rows(gradients, self.shapes)
        self._sums.add_rows(rows, n)

    def blocks(self, name: str) -> Tensor:
        """Return `F_b` of all blocks of a parameter, `[n_blocks, B, B]` float64.

        A last block that is shorter than `B` is padded with zeros.

        Raises:
            UnknownParameter: `name` is not one of `names`.
            InvalidArgument: There are no samples.
            MemoryError: There is no memory for blocks of `block_size`.
        """
        p = self._sums.packed(name)
        size = p.block_size
        dense = _core.blocks(self._sums.for_core(p), size).reshape(-1, size, size)
        self._check_finite(name, dense.diagonal(axis1=1, axis2=2))
        wanted = self.block_size or size
        if wanted == size:
            return torch.from_numpy(dense)
        try:
            padded = np.zeros((len(dense), wanted, wanted))
        except (MemoryError, ValueError, OverflowError):
            raise MemoryError(
                f"block_size must leave room for blocks of {name!r} that are padded to it, got "
                f"{wanted} ({8 * len(dense) * wanted**2} bytes)"
            ) from None
        padded[:, :size, :size] = dense
        return torch.from_numpy(padded)

    def diagonal(self) -> dict[str, Tensor]:
        """Return the mean squared gradient of every weight, name to the parameter's shape, float64.

        Raises:
            InvalidArgument: There are no samples.
        """
        self._sums.check_samples()
        result = {}
        for name, p in self._sums.parameters.items():
            if p.packed is None:
                rows = p.gradients().astype(np.float64, copy=False)
                flat = np.einsum("nd,nd->d", rows, rows) / self._sums.samples
            else:
                flat = _core.diagonal(self._sums.for_core(p), p.block_size)
            self._check_finite(name, flat)
            result[name] = torch.from_numpy(flat).reshape(p.shape)
            self._sums.storage.release()
        return result

    def _check_finite(self, name: str, squares: NDArray[np.float64]) -> None:
        """Raise GradientOverflow if mean squared gradients, read from a file, are not finite."""
        if not np.isfinite(squares).all():
            raise GradientOverflow(
                f"statistics of {name!r} must be finite, got sums of squared gradients that have "
                f"overflowed {self.precision}; collect them again with the loss scaled down, or "
                "with precision='float64'"
            )

    def mean_gradient(self) -> dict[str, Tensor]:
        """Return the mean gradient of every weight, name to the parameter's shape, float64.

        Raises:
            InvalidArgument: There are no samples.
        """
        self._sums.check_samples()
        n = self._sums.samples
        return {
            name: torch.from_numpy(p.sums.astype(np.float64) / n).reshape(p.shape)
            for name, p in self._sums.parameters.items()
        }

    def inverse_diagonals(
        self, damping: float, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, InverseDiagonal]:
        """Return `diag((F_b + λI)⁻¹)` of every parameter, with a bound of its relative error.

        The bound: summed in `S` steps of up to 128 samples (`N/128`, more for smaller updates) with
        unit roundoff `u` (2⁻²⁴ for float32), an entry `F_ij` has an error of at most
        `ε √(F_ii F_jj)`, `ε = u (√128 + √S)`, with high probability (Higham & Mary, 2019,
        section 2: the sum of independent rounding errors grows with the root of their number):
        2.3e-6 at `N = 100,000`. Rows of 16 bits add nothing to it, as the product of two such
        numbers is exact in float32; their own rounding is that of the gradients. Such errors change
        `diag(A⁻¹)` by at most `ε max_i F_ii ‖A⁻¹‖` relatively. Float64 itself adds
        `B 2⁻⁵³ max_i F_ii ‖A⁻¹‖`.

        Args:
            damping: `λ`, above zero.
            kept: Name to mask, True = still in the model when the statistics were collected. Other
                weights are ignored.

        Raises:
            InvalidArgument: `damping` is not a finite number above zero, or there are no samples.
        """
        self._sums.check_samples()
        return inverses.inverse_diagonals(self._sums, check_damping(damping), kept)

    def merge(self, other: BlockFisher, weight: float = 1.0) -> None:
        """Add the sums of `other` times `weight`: more samples, or a mixture of sources.

        Args:
            other: Statistics of the same parameters and block size; unchanged.
            weight: Weight of one sample of `other`, above zero.

        Raises:
            InvalidArgument: The parameters or block sizes differ, or the weight is not a finite
                number above zero.
            GradientOverflow: The sums would overflow; they are unchanged.
        """
        weight = real("weight", weight, above=0)
        check_same_model(self, other)
        self._sums.merge(other._sums, weight)

    def decay(self, factor: float) -> None:
        """Multiply the weight of all samples so far by `factor`, to forget old samples of a stream.

        `fisher.decay(0.9); fisher.merge(collect(model, new))` for each new part of a stream gives
        the exponentially weighted sum, in which a part from k steps ago has weight `0.9^k`.
        `samples` shrinks by the same factor. Means, such as `blocks`, do not change until more
        samples are added.

        Args:
            factor: In (0, 1].

        Raises:
            InvalidArgument: `factor` is out of range, or so small that the number of samples
                underflows; the statistics are unchanged.
        """
        number = real("factor", factor, above=0, most=1)
        left = self._sums.samples * number
        if self._sums.samples > 0 and left < np.finfo(self.precision).tiny:
            raise InvalidArgument(
                f"factor must leave a number of samples above zero in {self.precision}, got "
                f"{factor!r}, which leaves {left:g}"
            )
        self._sums.scale(number, left)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        shard_bytes: int | str | None = None,
    ) -> None:
        """Write the statistics to a safetensors file, in small pieces.

        The file is complete or not written at all.

        Args:
            path: The file; with `shard_bytes`, a JSON index whose shards are written beside it.
            dtype: `"bfloat16"` halves the size of the file. Every entry of `F_b` is rounded by up
                to 2⁻⁸ of its value. The error bound of scores includes this rounding, and `λ` must
                be at least about that fraction of the largest eigenvalue for blocks to be positive
                definite. None writes the sums without rounding.
            shard_bytes: Most bytes of a shard, or text such as `"4GiB"`; parameters are not cut.

        Raises:
            InvalidArgument: An argument is invalid.
            OSError: The disk is full, or the folder is not writable.
        """
        files.write(self._sums, path, dtype=dtype, shard_bytes=shard_bytes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> BlockFisher:
        """Read statistics written by `save`; the file is memory-mapped and read on use.

        Scores, eliminations and compensation read it in pieces. `update`, `merge` and `decay` copy
        what they change into memory.

        Args:
            path: A file, or the index of shards.
            verify: Whether to read everything once and compare it with the digest.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is truncated, modified, or not a file of statistics.
        """
        return fisher_of(files.read(path, verify=verify))


def fisher_of(sums: ModelSums) -> BlockFisher:
    """Return statistics that hold the given sums, without a copy."""
    fisher = BlockFisher.__new__(BlockFisher)
    fisher._sums = sums
    return fisher


def sums_of(fisher: BlockFisher) -> ModelSums:
    """Return the sums that statistics hold, without a copy."""
    return fisher._sums


def check_same_model(fisher: BlockFisher, other: BlockFisher) -> None:
    """Raise InvalidArgument unless two statistics have the same parameters and block size."""
    if other.shapes != fisher.shapes or other.block_size != fisher.block_size:
        raise InvalidArgument(
            "other must have the same parameters, shapes and block size as the statistics it is "
            f"merged into, got {other!r} for {fisher!r}"
        )
