"""The cases of `fastsal bench`; each creates its data when it runs and frees it afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import fastsal
import fastsal._core as _core
from fastsal.cli.bench.engine import engine_cases
from fastsal.cli.bench.kernels import kernel_cases
from fastsal.cli.bench.peers import (
    sparseml_fisher,
    torch_fisher,
    torch_inverse_diagonal,
)
from fastsal.cli.bench.sizes import BenchSize, by_instructions, faster, longer, random_rows
from fastsal.cli.bench.timing import Case, Comparison, Skip, keep_freed_memory

_DAMPING = 1e-5


def cases_of(size: BenchSize) -> Iterator[Case]:
    """Yield all cases at the given sizes."""
    for block, wanted in ((64, by_instructions(0.72, 0.60)), (128, by_instructions(0.82, 0.68))):
        yield Case(
            f"Gram kernel, blocks of {block}, 64 rows of {size.gram_weights:,} weights",
            "useful FLOP/s over torch.mm's",
            wanted,
            partial(_gram, size, block),
        )
    for n in size.samples:
        name = f"statistics and inverse diagonal, {size.weights:,} weights, {n} gradients"
        wanted = by_instructions(55.0, 45.0) if n < 1024 else by_instructions(75.0, 65.0)
        yield Case(name, "times as fast", wanted, partial(_against_sparseml, size, n))
    yield Case(
        f"statistics and inverse diagonal, {size.weights:,} weights, 256 gradients",
        "times as fast",
        1.0,
        partial(_against_torch, size),
    )
    for block in (32, 64, 128, 256):
        yield Case(
            f"greedy elimination of {size.weights:,} weights in blocks of {block}",
            "times as long",
            2.2,
            partial(_greedy, size, block),
            at_least=False,
        )
    yield from kernel_cases(size)
    for peer, wanted in (("torch.kthvalue", 12.0), ("np.partition", 1.0)):
        name = f"threshold of {size.scores:,} scores"
        yield Case(name, "times as fast", wanted, partial(_threshold, size, peer))
    yield Case(
        f"statistics of {16 * size.gram_weights:,} weights over {size.gram_weights:,}, per weight",
        "times as long",
        1.15,
        partial(_growth_in_weights, size),
        at_least=False,
    )
    yield Case(
        f"statistics of 1,024 samples over 64, {size.weights:,} weights, per sample",
        "times as long",
        1.15,
        partial(_growth_in_samples, size),
        at_least=False,
    )
    yield Case(
        "the command line's start (--help)", "of import torch's time", 0.25, _start, at_least=False
    )
    yield from engine_cases(size)


def _gram(size: BenchSize, block: int) -> Comparison:
    n, d, side = 64, size.gram_weights, 3072
    rows = random_rows(n, d).numpy()
    packed, sums = np.zeros(_core.packed_len(d, block), np.float32), np.zeros(d, np.float32)
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    # One multiply-add per entry: of the triangles for the core, of the square for torch.
    useful, whole = n * d * (block + 1), 2 * side**3
    return Comparison(
        lambda: _core.accumulate(rows, "float32", block, packed, sums),
        lambda: torch.mm(a, b, out=out),
        f"torch.mm of {side}²",
        lambda ours, theirs: (useful / ours) / (whole / theirs),
        pairs=2 * size.pairs - 1,
    )


def _statistics(rows: Tensor) -> tuple[fastsal.BlockFisher, np.ndarray]:
    fisher = fastsal.BlockFisher({"w": (rows.shape[1],)}, block_size=64)
    fisher.update({"w": rows})
    return fisher, fisher.inverse_diagonals(_DAMPING)["w"].values


def _exact(rows: Tensor) -> np.ndarray:
    fisher = fastsal.BlockFisher({"w": (rows.shape[1],)}, block_size=64, precision="float64")
    fisher.update({"w": rows.double()})
    return fisher.inverse_diagonals(_DAMPING)["w"].values


def _against_sparseml(size: BenchSize, n: int) -> Comparison:
    try:
        peer_class = sparseml_fisher()
    except ImportError as missing:
        raise Skip(f"SparseML is not installed; {missing}") from missing
    keep_freed_memory()
    rows = random_rows(n, size.weights)
    made: list[object] = []

    def peer() -> None:
        fisher = peer_class(n, 64, rows.shape[1], _DAMPING, torch.device("cpu"))
        for row in rows:
            fisher.add_grad(row)
        made[:] = [fisher, fisher.diag()]

    def after() -> str:
        fisher, mine = _statistics(rows)
        theirs, diagonal = made
        truth = _exact(rows)
        errors = [float(np.abs(np.asarray(x) / truth - 1).max()) for x in (mine, diagonal)]
        memory = fisher.nbytes / (theirs.f_inv.numel() * 4)  # type: ignore[attr-defined]
        return (
            f"error against all-float64 {errors[0]:.1e}, SparseML's {errors[1]:.1e}; "
            f"memory {memory:.3f} of SparseML's"
        )

    return Comparison(lambda: _statistics(rows), peer, "SparseML", faster, 3, after)


def _against_torch(size: BenchSize) -> Comparison:
    rows = random_rows(256, size.weights)
    return Comparison(
        lambda: _statistics(rows),
        lambda: torch_inverse_diagonal(torch_fisher(rows, 64), _DAMPING),
        "torch.bmm, batched Cholesky and inverse, float32",
        faster,
        size.pairs,
    )


def _greedy(size: BenchSize, block: int) -> Comparison:
    d = size.weights
    fisher = fastsal.BlockFisher({"w": (d,)}, block_size=block)
    fisher.update({"w": random_rows(2 * block, d)})
    model = nn.Module()
    model.w = nn.Parameter(random_rows(1, d)[0])
    return Comparison(
        lambda: fastsal.score(model, fisher, "obs-greedy", 1e-3),
        lambda: fisher.inverse_diagonals(1e-3),
        "the inverse diagonal of the same blocks",
        longer,
        2 * size.pairs - 1,
    )


def _threshold(size: BenchSize, peer: str) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(size.scores, generator=generator).square().numpy()
    k = 9 * scores.size // 10
    jobs: dict[str, Callable[[], object]] = {
        "torch.kthvalue": lambda: torch.from_numpy(scores).kthvalue(k),
        "np.partition": lambda: np.partition(scores, k),
    }
    return Comparison(lambda: _core.kth_smallest([scores], k), jobs[peer], peer, faster, 3)


def _start() -> Comparison:
    def python(*arguments: str) -> Callable[[], object]:
        command = [sys.executable, *arguments]
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    ours, peer = python("-m", "fastsal", "--help"), python("-c", "import torch")
    return Comparison(ours, peer, "import torch", longer, 3)


def _growth_in_weights(size: BenchSize) -> Comparison:
    keep_freed_memory()
    rows = random_rows(64, size.gram_weights)

    def sums(parameters: int) -> int:
        names = [f"w{i}" for i in range(parameters)]
        fisher = fastsal.BlockFisher(dict.fromkeys(names, (rows.shape[1],)), block_size=64)
        fisher.update(dict.fromkeys(names, rows))
        return len(fisher.inverse_diagonals(_DAMPING))

    return Comparison(
        lambda: sums(16),
        lambda: [sums(1) for _ in range(16)],
        "sixteen times the smaller",
        longer,
        3,
    )


def _growth_in_samples(size: BenchSize) -> Comparison:
    keep_freed_memory()
    rows = random_rows(1024, size.weights)
    held: dict[int, int] = {}

    def sums(n: int, times: int) -> None:
        for _ in range(times):
            fisher = fastsal.BlockFisher({"w": (rows.shape[1],)}, block_size=64)
            fisher.update({"w": rows[:n]})
            held[n] = fisher.nbytes

    return Comparison(
        lambda: sums(1024, 1),
        lambda: sums(64, 16),
        "sixteen times the smaller",
        longer,
        3,
        lambda: f"memory {held[1024] / held[64]:.3f} of the smaller's",
    )
