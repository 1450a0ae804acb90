"""Sums on the model's own device: one batched matrix product a parameter and micro-batch.

The blocks are whole float32 squares there, twice the memory of packed triangles: a batched product
adds to a square in place, while a triangle would have to be gathered and scattered each time, which
costs more traffic than the square has. They are packed once, when they leave the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsal.errors import NonFiniteGradient
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.sums import flat_rows


@dataclass
class _Sums:
    """Axes: K blocks of B weights, the last one padded; d weights."""

    squares: Tensor  # [K, B, B]
    total: Tensor  # [d]


def tile_bytes(fisher: BlockFisher) -> int:
    """Return the device memory that the squares and sums of all parameters take."""
    size = 0
    for p in fisher._parameters.values():
        size += 4 * (math.ceil(p.d / p.block_size) * p.block_size**2 + p.d)
    return size


class DeviceTiles:
    """A sink that adds rows on the device they are on.

    Args:
        fisher: What the sums end in, at `flush`.
        device: Where rows come from.
    """

    def __init__(self, fisher: BlockFisher, device: torch.device) -> None:
        self._fisher = fisher
        self._device = device
        self._sums: dict[str, _Sums] = {}
        # Whether rows were finite, name to a scalar: read once a micro-batch, as reading waits.
        self._finite: dict[str, Tensor] = {}
        self._seen = 0

    def expect(self, samples: int) -> None:
        """Nothing depends on it here."""

    def __call__(self, name: str, rows: Tensor) -> None:
        """Add `GᵀG` of every block and the sum of rows `[n, *shape]`."""
        p = self._fisher._parameters[name]
        block, count = p.block_size, math.ceil(p.d / p.block_size)
        if name not in self._sums:
            self._sums[name] = _Sums(
                torch.zeros(count, block, block, device=self._device),
                torch.zeros(p.d, device=self._device),
            )
        sums = self._sums[name]
        flat = flat_rows(rows).float()
        chunk = flat.sum(0)
        self._finite[name] = chunk.isfinite().all()
        sums.total += chunk
        missing = count * block - p.d
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing))
        blocks = flat.view(-1, count, block).transpose(0, 1)  # [K, n, B]
        with _full_float32():
            sums.squares.baddbmm_(blocks.transpose(1, 2), blocks)

    def end_micro_batch(self, n: int) -> None:
        """Count samples.

        Raises:
            NonFiniteGradient: NaN or infinity in this micro-batch; names the parameter.
        """
        if self._finite:
            finite = torch.stack(list(self._finite.values())).tolist()
            for name, fine in zip(self._finite, finite, strict=True):
                if not fine:
                    raise NonFiniteGradient(
                        f"gradients: {name!r} is NaN or infinite for one of the samples "
                        f"{self._seen} to {self._seen + n - 1}; takes finite gradients"
                    )
            self._finite.clear()
        self._seen += n
        self._fisher._count(n)

    def flush(self) -> None:
        """Pack the sums and add them to the statistics."""
        for name, sums in self._sums.items():
            p = self._fisher._parameters[name]
            p.add_sums(_packed(sums.squares, p.d).cpu().numpy(), sums.total.cpu().numpy())
        self._sums.clear()


def _packed(squares: Tensor, d: int) -> Tensor:
    """Upper triangles by rows of `[K, B, B]`, one after the other; the last block may be short."""
    block = squares.shape[1]
    whole, short = divmod(d, block)
    parts = []
    for part, size in ((squares[:whole], block), (squares[whole:], short)):
        if len(part):
            row, column = torch.triu_indices(size, size, device=squares.device)
            parts.append(part[:, row, column].reshape(-1))
    return torch.cat(parts)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32: ten bits of mantissa would show in the inverse."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
