"""Where per-sample gradients go: three ways to the statistics, chosen by device and memory.

All have the shape of `Sink`. The data never takes another way, so that a fourth (a file, another
machine) has its room here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.parts import Parts
from fastsal.fisher.sinks.base import Sink
from fastsal.fisher.sinks.gathering import RowGatherer, step_rows
from fastsal.fisher.sinks.slicing import PartSink
from fastsal.fisher.sinks.streaming import RowStream
from fastsal.fisher.sinks.tiles import DeviceTiles, tile_bytes
from fastsal.gradients.precision import row_dtype

__all__ = [
    "DeviceTiles",
    "PartSink",
    "RowGatherer",
    "RowStream",
    "Sink",
    "choose_sink",
    "step_rows",
]

# Of a GPU's free memory, what statistics may take: activations and rows need the rest.
_GPU_SHARE = 0.6


def choose_sink(
    fisher: BlockFisher,
    parameters: Mapping[str, nn.Parameter],
    parts: Parts,
    step: int,
    *,
    samples: int | None = None,
) -> Sink:
    """Choose by device and memory.

    CPU: rows are gathered and added by the core. CUDA: sums stay on the device as squares if those
    fit into a part of its free memory, else rows stream to the core.

    Args:
        fisher: The statistics that everything ends in, by the keys of `parts`.
        parameters: Name to parameter.
        parts: What there are statistics of.
        step: Rows that are added at a time (`step_rows`).
        samples: Samples to come in all, if known.
    """
    device = next(iter(parameters.values())).device
    sink: Sink
    if device.type == "cpu":
        dtypes = {key: row_dtype(parameters[part.name]) for key, part in parts.items()}
        sink = RowGatherer(fisher, dtypes, step, expected=samples)
    elif device.type == "cuda" and fisher.precision == "float32" and _fits(fisher, device):
        sink = DeviceTiles(fisher, device)
    else:
        sink = RowStream(fisher, device, expected=samples)
    is_cut = not all(part.is_whole for part in parts.values())
    return PartSink(sink, parts) if is_cut else sink


def _fits(fisher: BlockFisher, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return tile_bytes(fisher) <= _GPU_SHARE * free
