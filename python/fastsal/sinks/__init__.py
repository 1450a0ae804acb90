"""Where per-sample gradients go: three ways to the statistics, chosen by device and memory.

All have the shape of `Sink`. The data never takes another way, so that a fourth (a file, another
machine) has its room here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fastsal.fisher import BlockFisher
from fastsal.sinks.gathering import RowGatherer
from fastsal.sinks.streaming import RowStream
from fastsal.sinks.tiles import DeviceTiles, tile_bytes

__all__ = ["DeviceTiles", "RowGatherer", "RowStream", "Sink", "choose_sink"]

# Of a GPU's free memory, what statistics may take: activations and rows need the rest.
_GPU_SHARE = 0.6


class Sink(Protocol):
    """Takes the rows of every parameter, once a micro-batch, during the backward pass."""

    def expect(self, samples: int) -> None:
        """At least so many samples come in all."""

    def __call__(self, name: str, rows: Tensor) -> None:
        """Take rows `[n, *shape]` of a parameter; the memory is valid during the call only."""

    def end_micro_batch(self, n: int) -> None:
        """All parameters have had their rows of `n` samples."""

    def flush(self) -> None:
        """Bring everything into the statistics."""


def choose_sink(
    fisher: BlockFisher,
    parameters: Mapping[str, nn.Parameter],
    micro_batch: int,
    *,
    samples: int | None = None,
    spare: int | None = None,
) -> Sink:
    """Choose by device and memory.

    CPU: rows are gathered and added by the core. CUDA: sums stay on the device as squares if those
    fit into a part of its free memory, else rows stream to the core.

    Args:
        fisher: The statistics that everything ends in.
        parameters: Name to parameter.
        micro_batch: The most rows that come at a time.
        samples: Samples to come in all, if known.
        spare: Bytes of main memory that buffers may take; None for no limit.
    """
    device = next(iter(parameters.values())).device
    if device.type == "cpu":
        return RowGatherer(fisher, parameters, micro_batch, expected=samples, spare=spare)
    if device.type == "cuda" and fisher.precision == "float32":
        free, _ = torch.cuda.mem_get_info(device)
        if tile_bytes(fisher) <= _GPU_SHARE * free:
            return DeviceTiles(fisher, device)
    return RowStream(fisher, device, expected=samples)
