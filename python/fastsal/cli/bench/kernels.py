"""Cases of single kernels of the core: N:M, compensation, dual form, masks, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsal
import fastsal._core as _core
from fastsal.cli.bench.peers import (
    torch_compensation,
    torch_dual_diagonal,
    torch_inverse_diagonal,
    torch_n_of_m,
)
from fastsal.cli.bench.sizes import BenchSize, faster, longer, random_rows
from fastsal.cli.bench.timing import Case, Comparison
from fastsal.fisher.block_fisher import sums_of
from fastsal.fisher.model_sums import CoreParameter

_DAMPING = 1e-3


def kernel_cases(size: BenchSize) -> Iterator[Case]:
    """Yield the cases of the kernels at the given sizes."""
    for block in (16, 32, 64, 128):
        yield Case(
            f"inverse diagonal of {size.weights // block:,} blocks of {block}, in float64",
            "times as fast",
            10.0,
            partial(_inverse_diagonal, size, block),
        )
    yield Case(
        "inverse of one block of 1,536, in float64", "times as fast", 1.0, partial(_inverse, 1536)
    )
    for block in (64, 256):
        yield Case(
            f"2:4 by joint cost of {size.weights:,} weights in blocks of {block}",
            "times as long",
            3.0,
            partial(_joint, size, block),
            at_least=False,
        )
    yield Case(
        f"2:4 by score of {size.scores:,} weights",
        "times as fast",
        5.0,
        partial(_n_of_m, size),
    )
    for block in (64, 256):
        yield Case(
            f"compensation of {size.weights:,} weights in blocks of {block}, half of them pruned",
            "times as fast",
            5.0,
            partial(_compensation, size, block),
        )
    yield Case(
        f"inverse diagonal of blocks of 1,024 from 64 gradients of {size.weights:,} weights",
        "times as fast",
        1.0,
        partial(_dual, size),
    )
    yield Case(
        f"mask of {size.scores:,} scores from a threshold",
        "times as long",
        1.3,
        partial(_mask, size),
        at_least=False,
    )
    yield Case(
        f"threshold of {size.scores:,} scores, a third of them equal",
        "times as fast",
        15.0,
        partial(_equal_scores, size),
    )
    yield Case(
        f"rank of {size.scores:,} scores, masks included",
        "times as fast",
        12.0,
        partial(_rank, size),
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield Case(
            f"check of 16 gradients of {size.weights:,} weights in {name} for NaN",
            "times as fast",
            1.0,
            partial(_check, size, dtype),
        )


def _fisher(size: BenchSize, block: int, rows: int) -> tuple[fastsal.BlockFisher, CoreParameter]:
    """Return statistics of blocks, and their sums for the core."""
    fisher = fastsal.BlockFisher({"w": (size.weights,)}, block_size=block)
    fisher.update({"w": random_rows(rows, size.weights)})
    (sums,), _ = sums_of(fisher).all_for_core()
    return fisher, sums


def _damped(fisher: fastsal.BlockFisher, whole: int) -> Tensor:
    """Return `F_b + λI` of the first `whole` blocks in float32."""
    blocks = fisher.blocks("w")[:whole].float()
    return blocks + _DAMPING * torch.eye(blocks.shape[1])


def _inverse_diagonal(size: BenchSize, block: int) -> Comparison:
    fisher, sums = _fisher(size, block, 2 * block)
    dense = fisher.blocks("w").float()
    return Comparison(
        lambda: _core.inverse_diagonal([sums], block, _DAMPING),
        lambda: torch_inverse_diagonal(dense, _DAMPING),
        "torch's batched Cholesky and inverse, float32",
        faster,
        2 * size.pairs - 1,
    )


def _inverse(block: int) -> Comparison:
    fisher, sums = _fisher(BenchSize(weights=block), block, 2 * block)
    damped = fisher.blocks("w")[0] + _DAMPING * torch.eye(block, dtype=torch.float64)
    return Comparison(
        lambda: _core.inverse([sums], block, _DAMPING),
        lambda: torch.linalg.inv(damped),
        "torch.linalg.inv, float64",
        faster,
        5,
    )


def _joint(size: BenchSize, block: int) -> Comparison:
    _, sums = _fisher(size, block, 2 * block)
    weights = [random_rows(1, size.weights)[0].numpy()]
    shapes = [(size.weights // 1024, 1024, 1)]
    return Comparison(
        lambda: _core.n_of_m_joint([sums], weights, shapes, block, 2, 4, _DAMPING),
        lambda: _core.eliminate([sums], weights, block, _DAMPING),
        "greedy elimination of the same blocks",
        longer,
        2 * size.pairs - 1,
    )


def _n_of_m(size: BenchSize) -> Comparison:
    scores = _scores(size.scores // 1024 * 1024)
    shape = (scores.size // 1024, 1024, 1)
    return Comparison(
        lambda: _core.n_of_m(scores, shape, 2, 4),
        lambda: torch_n_of_m(torch.from_numpy(scores), 2, 4),
        "torch.topk and scatter",
        faster,
        3,
    )


def _compensation(size: BenchSize, block: int) -> Comparison:
    fisher, sums = _fisher(size, block, 2 * block)
    weights = random_rows(1, size.weights)[0]
    kept = torch.rand(size.weights, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = kept.numpy()
    damped = _damped(fisher, size.weights // block)
    return Comparison(
        lambda: _core.compensate([sums], [weights.numpy()], [mask], block, _DAMPING),
        lambda: torch_compensation(damped, weights.view(-1, block), kept.view(-1, block)),
        "torch's batched Cholesky and solve, float32",
        faster,
        size.pairs,
    )


def _dual(size: BenchSize) -> Comparison:
    block, rows = 1024, random_rows(64, size.weights)
    gradients = rows.numpy()
    return Comparison(
        lambda: _core.dual_inverse_diagonal(gradients, "float32", block, 64.0, None, _DAMPING),
        lambda: torch_dual_diagonal(rows, block, _DAMPING),
        "torch.bmm, batched Cholesky and triangular solve, float32",
        faster,
        size.pairs,
    )


def _scores(count: int) -> NDArray[np.float32]:
    generator = torch.Generator().manual_seed(0)
    scores: NDArray[np.float32] = torch.rand(count, generator=generator).square().numpy()
    return scores


def _mask(size: BenchSize) -> Comparison:
    scores = _scores(size.scores)
    # Bits of positive floats are ordered as the floats; keys of others precede them.
    cut = np.float32(0.5)
    key = int(cut.view(np.uint32)) | 1 << 31
    return Comparison(
        lambda: _core.mask_below(scores, key, 0),
        lambda: np.greater_equal(scores, cut),
        "np.greater_equal",
        longer,
        2 * size.pairs - 1,
    )


def _equal_scores(size: BenchSize) -> Comparison:
    scores = _scores(size.scores)
    scores[::3] = 0.0
    # Inside the equal ones, where the rest of a search is longest.
    k = scores.size // 4
    peer: Callable[[], object] = lambda: torch.from_numpy(scores).kthvalue(k)  # noqa: E731
    return Comparison(lambda: _core.kth_smallest([scores], k), peer, "torch.kthvalue", faster, 3)


def _rank(size: BenchSize) -> Comparison:
    scores = {"w": torch.from_numpy(_scores(size.scores))}
    k = 9 * size.scores // 10
    return Comparison(
        lambda: fastsal.rank(scores, 0.9),
        lambda: scores["w"].kthvalue(k),
        "torch.kthvalue, which makes no masks",
        faster,
        5,
    )


def _check(size: BenchSize, dtype: torch.dtype) -> Comparison:
    rows = random_rows(16, size.weights).to(dtype)
    given = rows.view(torch.uint16).numpy() if dtype.itemsize == 2 else rows.numpy()
    name = str(dtype).removeprefix("torch.")
    return Comparison(
        lambda: _core.largest(given, name),
        lambda: torch.isfinite(rows).all(),
        "torch.isfinite",
        faster,
        2 * size.pairs - 1,
    )
