"""From sums to masks and weights: the core on the CPU, factorization on the device, and SparseML.

Axes: n rows, d weights, K blocks of B.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

import fastsal
from benches.gpu.size import Row, Size, peak, row, seconds, start_peak
from benches.gpu.sums import BLOCK
from fastsal.cli.bench.peers import sparseml_fisher
from fastsal.fisher.block_fisher import sums_of
from fastsal.fisher.sinks.tiles import DeviceTiles

_PARAMETERS = 10
_DAMPING = 1e-5


def core(size: Size, device: torch.device) -> Iterator[Row]:
    """Time factorization, elimination, ranking and compensation in the core, for all weights.

    Beside them the batched factorization of the device, which yields the inverse diagonals alone.
    """
    cpu = torch.device("cpu")
    each = size.weights // _PARAMETERS // BLOCK * BLOCK
    names = [f"w{i}" for i in range(_PARAMETERS)]
    rows = torch.randn(3 * BLOCK // 2, each) * 1e-2
    model = nn.Module()
    for name in names:
        model.register_parameter(name, nn.Parameter(torch.randn(each)))
    fisher = fastsal.BlockFisher(dict.fromkeys(names, (each,)), block_size=BLOCK)
    spent = seconds(partial(fisher.update, dict.fromkeys(names, rows)), cpu)
    what = f"{each * _PARAMETERS:,} weights on {os.cpu_count()} cores"
    yield row(f"sums of {len(rows)} rows, {what}", spent, "s")
    found: dict[str, object] = {}

    def score(criterion: str) -> None:
        found[criterion] = fastsal.score(model, fisher, criterion, damping="0.1x")

    for criterion in ("block-fisher", "obs-greedy"):
        spent = seconds(lambda c=criterion: score(c), cpu)
        yield row(f"{criterion} scores, {what}", spent, "s")

    def rank() -> None:
        found["masks"] = fastsal.rank(found["obs-greedy"], 0.7)

    yield row(f"threshold and masks, {what}", seconds(rank, cpu), "s")
    found.pop("obs-greedy"), found.pop("block-fisher")
    masks = found["masks"]
    spent = seconds(lambda: fastsal.compensate(model, fisher, masks), cpu)
    yield row(f"joint compensation, {what}", spent, "s")
    yield from _factorization(fisher, size, device)


def _factorization(fisher: fastsal.BlockFisher, size: Size, device: torch.device) -> Iterator[Row]:
    """Time batched Cholesky and inverse on the device, for all blocks."""
    blocks = fisher.blocks("w0")[: size.solved]
    total = size.weights / BLOCK
    exact = torch.linalg.inv(_damped(blocks[:64])).diagonal(dim1=1, dim2=2)
    for dtype in (torch.float32, torch.float64):
        there = _damped(blocks.to(device, dtype))
        spent = seconds(lambda x=there: inverse_diagonal(x), device, size.repeats)
        off = float((inverse_diagonal(there[:64]).cpu().double() / exact - 1).abs().max())
        yield row(
            f"batched Cholesky and inverse on the device, {dtype}".replace("torch.", ""),
            spent * total / len(blocks), "s", error=off,
        )  # fmt: skip


def _damped(blocks: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(BLOCK, dtype=blocks.dtype, device=blocks.device)
    return blocks + 0.1 * blocks.diagonal(dim1=1, dim2=2).mean() * eye


def inverse_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """Return the diagonals of the inverses of blocks `[K, B, B]`."""
    factor = torch.linalg.cholesky(blocks)
    return torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)


def peer(size: Size, device: torch.device) -> Iterator[Row]:
    """Time statistics and inverse diagonals against SparseML's class on the same device.

    Raises:
        ImportError: SparseML is not installed.
    """
    theirs_class = sparseml_fisher()
    weights, n = size.peer
    rows = torch.randn(n, weights, device=device) * 1e-2
    found: dict[str, torch.Tensor] = {}

    def theirs() -> None:
        fisher = theirs_class(n, BLOCK, weights, _DAMPING, device)
        for each in rows:
            fisher.add_grad(each)
        found["theirs"] = torch.as_tensor(fisher.diag())

    def ours() -> None:
        fisher = fastsal.BlockFisher({"w": (weights,)}, block_size=BLOCK)
        sink = DeviceTiles(sums_of(fisher), device)
        for start in range(0, n, 64):
            part = rows[start : start + 64]
            sink("w", part)
            sink.end_micro_batch(len(part))
        sink.flush()
        found["ours"] = torch.from_numpy(fisher.inverse_diagonals(_DAMPING)["w"].values)

    what = f"{weights:,} weights, {n} gradients"
    start_peak(device)
    mine = seconds(ours, device, size.repeats)
    yield row(f"fastsal, {what}", mine, "s")
    yield from peak("memory of fastsal and the rows", device)
    start_peak(device)
    other = seconds(theirs, device)
    yield row(f"SparseML, {what}", other, "s")
    yield from peak("memory of SparseML and the rows", device)
    yield row("fastsal is faster", other / mine, "times", at_least=60)
    apart = (found["theirs"].cpu().double().reshape(-1) / found["ours"].reshape(-1) - 1).abs()
    yield row("difference of the inverse diagonals", float(apart.max()), "relative")
    assert math.isfinite(float(apart.max()))
