"""Choice of the sink that adds per-sample gradients to the sums, by device and memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Parts
from fastsal.fisher.sinks.base import RowSink
from fastsal.fisher.sinks.gathering import RowGatherer, step_rows
from fastsal.fisher.sinks.slicing import PartSink
from fastsal.fisher.sinks.streaming import RowStream
from fastsal.fisher.sinks.tiles import DeviceTiles, tile_bytes
from fastsal.gradients.precision import row_dtype

__all__ = [
    "DeviceTiles",
    "PartSink",
    "RowGatherer",
    "RowSink",
    "RowStream",
    "choose_sink",
    "step_rows",
]

# Largest fraction of a GPU's free memory for sums; the rest is for activations and rows.
_GPU_SHARE = 0.6


def choose_sink(
    sums: ModelSums,
    parameters: Mapping[str, nn.Parameter],
    parts: Parts,
    step: int,
    *,
    samples: int | None = None,
) -> RowSink:
    """Choose a sink by device and memory.

    On the CPU, rows are gathered and added by the core. With CUDA, squares are summed on the device
    if they fit in a fraction of its free memory; otherwise rows are streamed to main memory.

    Args:
        sums: The sums that rows are added to, by the keys of `parts`.
        parameters: Name to parameter.
        parts: Parts to collect, by their keys.
        step: Number of rows added at a time (`step_rows`).
        samples: Total number of samples, if known.
    """
    device = next(iter(parameters.values())).device
    sink: RowSink
    if device.type == "cpu":
        dtypes = {key: row_dtype(parameters[part.name]) for key, part in parts.items()}
        sink = RowGatherer(sums, dtypes, step, expected=samples)
    elif device.type == "cuda" and sums.precision == "float32" and _fits(sums, device):
        sink = DeviceTiles(sums, device)
    else:
        sink = RowStream(sums, device, expected=samples)
    is_cut = not all(part.is_whole for part in parts.values())
    return PartSink(sink, parts) if is_cut else sink


def _fits(sums: ModelSums, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return tile_bytes(sums) <= _GPU_SHARE * free
