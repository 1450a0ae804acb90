"""Summation on the model's device: one batched matrix product a parameter and micro-batch.

Blocks are full float32 squares on the device, twice the memory of packed triangles. A batched
product adds to a square in place; a triangle would have to be gathered and scattered each time,
which moves more data. Squares are packed once, when they are copied to main memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import fastsal._core as _core
from fastsal.errors import GradientOverflow, NonFiniteGradient
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.rows import flat_rows
from fastsal.fisher.sinks.downloads import Downloads
from fastsal.fisher.sums import HARMLESS, ParameterSums
from fastsal.gradients.precision import full_float32


@dataclass
class Tile:
    """Sums of one parameter on the device.

    Axes: K blocks of B weights, the last one padded; d weights.
    """

    squares: Tensor  # [K, B, B]
    total: Tensor  # [d]


def tile_bytes(sums: ModelSums) -> int:
    """Return the device memory of the squares and sums of all parameters, in bytes."""
    size = 0
    for p in sums.parameters.values():
        size += 4 * (math.ceil(p.d / p.block_size) * p.block_size**2 + p.d)
    return size


class DeviceTiles:
    """Sums rows on their device.

    Args:
        sums: The sums in main memory, to which those of the device are added at `flush`.
        device: The device that rows are on.

    Attributes:
        tiles: Name to the sums on the device.
    """

    def __init__(self, sums: ModelSums, device: torch.device) -> None:
        self._sums = sums
        self._device = device
        self.tiles: dict[str, Tile] = {}
        # Largest magnitude of rows, name to a scalar; read once a micro-batch, as reading waits.
        self._largest: dict[str, Tensor] = {}
        self._seen = 0

    def expect(self, samples: int) -> None:
        """Do nothing: the number of samples does not matter here."""

    def __call__(self, name: str, rows: Tensor) -> None:
        """Add `GᵀG` of every block and the sum of rows `[n, *shape]`."""
        p = self._sums.parameters[name]
        block, count = p.block_size, math.ceil(p.d / p.block_size)
        if name not in self.tiles:
            self.tiles[name] = Tile(
                torch.zeros(count, block, block, dtype=torch.float32, device=self._device),
                torch.zeros(p.d, dtype=torch.float32, device=self._device),
            )
        tile = self.tiles[name]
        flat = flat_rows(rows).float()
        self._largest[name] = torch.linalg.vector_norm(flat, math.inf)
        tile.total += flat.sum(0)
        missing = count * block - p.d
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing))
        blocks = flat.view(-1, count, block).transpose(0, 1)  # [K, n, B]
        with full_float32():
            tile.squares.baddbmm_(blocks.transpose(1, 2), blocks)

    def end_micro_batch(self, n: int) -> None:
        """Count `n` samples.

        Raises:
            NonFiniteGradient: NaN or infinity in this micro-batch; names the parameter.
            GradientOverflow: Sums of squares have overflowed; names the parameter.
        """
        if self._largest:
            found = torch.stack(list(self._largest.values())).tolist()
            for name, largest in zip(self._largest, found, strict=True):
                # A comparison with NaN is false.
                if not largest < HARMLESS["float32"]:
                    samples = f"in one of the samples {self._seen} to {self._seen + n - 1}"
                    self._check(name, largest, samples)
            self._largest.clear()
        self._seen += n
        self._sums.count(n)

    def _check(self, name: str, largest: float, samples: str) -> None:
        if not math.isfinite(largest):
            raise NonFiniteGradient(
                f"gradients must be finite, got NaN or infinity for {name!r}, {samples}"
            )
        squares = self.tiles[name].squares.diagonal(dim1=1, dim2=2)
        if not bool(squares.isfinite().all()):
            raise GradientOverflow(
                f"sums of squared gradients must fit float32, got a gradient of {largest:.2g} for "
                f"{name!r}, {samples}; scale the loss down, or collect with precision='float64'"
            )

    def flush(self) -> None:
        """Pack the sums of the device and add them to those in main memory.

        Raises:
            GradientOverflow: Their sum overflows; names the parameter.
        """
        downloads = Downloads(self._device)
        for name, tile in self.tiles.items():
            p = self._sums.parameters[name]
            pieces = triangles(tile.squares, p.d, downloads.chunk)
            packed = downloads.array(pieces, _core.packed_len(p.d, p.block_size))
            total = tile.total.cpu().numpy()
            if not p.is_empty:
                added = ParameterSums(p.shape, p.block_size, p.dtype, total, packed)
                self._sums.check_fits(name, p, added, 1.0)
            p.add_sums(packed, total)
        self.tiles.clear()


def triangles(squares: Tensor, d: int, most: int) -> Iterator[Tensor]:
    """Yield the upper triangles of `[K, B, B]` in row order; the last block may be short.

    Args:
        squares: On any device.
        d: Number of weights.
        most: Largest number of elements of a piece.
    """
    block = squares.shape[1]
    whole, short = divmod(d, block)
    for part, size in ((squares[:whole], block), (squares[whole:], short)):
        if not len(part) or not size:
            continue
        row, column = torch.triu_indices(size, size, device=squares.device)
        places = row * block + column
        flat = part.flatten(1)
        if len(places) > most:
            for one in flat:
                for start in range(0, len(places), most):
                    yield one[places[start : start + most]]
            continue
        some = most // len(places)
        for start in range(0, len(flat), some):
            yield flat[start : start + some].index_select(1, places).reshape(-1)
