"""Inverse diagonals of damped blocks = torch.linalg.inv in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal import BlockFisher
from fastsal.errors import FactorizationError, InvalidArgument, PrecisionWarning
from fastsal.fisher.block_fisher import sums_of
from fastsal.fisher.inverses import rounding

DAMPINGS = [1e-8, 1e-6, 1e-4, 1e-2, 1.0]


pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(n, shape, *, scale="even", rank=None, seed=0):
    """Correlated gradients; as small as a real model's, or spread over six decades."""
    generator = torch.Generator().manual_seed(seed)
    d = math.prod(shape)
    factors = torch.randn(n, rank or d, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank or d, d, generator=generator, dtype=torch.float64)
    g = factors @ mixing / math.sqrt(d)
    if scale == "small":
        g *= 1e-3
    elif scale == "spread":
        g *= torch.logspace(-5, 0, d, dtype=torch.float64)
    elif scale == "some dead":
        g[:, ::3] = 0
    return g.reshape(n, *shape)


def inverse_diagonal(blocks, d, damping):
    """`diag((F + λI)⁻¹)` of all blocks, `[d]`."""
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return torch.linalg.inv(blocks + damping * eye).diagonal(dim1=1, dim2=2).reshape(-1)[:d]


def fed(g, block_size, precision="float32"):
    fisher = BlockFisher({"w": g.shape[1:]}, block_size=block_size, precision=precision)
    fisher.update({"w": g})
    return fisher


def relative(got, want):
    return float((torch.as_tensor(got) / want - 1).abs().max())


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("scale", ["even", "small", "spread", "some dead"])
@pytest.mark.parametrize(
    ("shape", "block_size", "n", "rank"),
    [((5, 26), 64, 300, None), ((5, 26), 64, 40, 10), ((9,), 1, 50, None), ((70,), 7, 90, 20),
     ((6, 20), None, 400, None), ((6, 20), None, 20, None), ((3,), 64, 33, None)],
)  # fmt: skip
def test_inverse_diagonal(shape, block_size, n, rank, scale, damping):
    g = gradients(n, shape, scale=scale, rank=rank).float()
    d = math.prod(shape)
    for precision in ("float64", "float32"):
        fisher = fed(g, block_size, precision)
        result = fisher.inverse_diagonals(damping)["w"]
        # The dual form keeps the gradients themselves, whatever the precision of the sums.
        is_dual = sums_of(fisher).parameters["w"].packed is None
        blocks = (fed(g, block_size, "float64") if is_dual else fisher).blocks("w")
        eigenvalues = torch.linalg.eigvalsh(blocks)
        least, most = eigenvalues.min() + damping, eigenvalues.max() + damping
        if precision == "float32" and least < 1e-9 * most:
            continue  # λ is below the rounding of the sums; the warning is tested below
        assert result.failed == []
        assert result.values.dtype == np.float64
        # Both sides are float64 and err by the condition of the blocks.
        limit = max(1e-6, 1e-15 * float(most / least))
        assert relative(result.values, inverse_diagonal(blocks, d, damping)) < limit


@pytest.mark.parametrize(
    ("scale", "step"),
    [("even", 1), ("even", 7), ("even", 1000), ("small", 1000), ("spread", 7), ("spread", 1000)],
)
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_error_bound_holds(scale, step, mean):
    """`errors` bounds the distance of float32 sums to float64 sums, however they are fed."""
    n, d = (5_000 if step == 1 else 20_000), 48
    g = gradients(n, (d,), scale=scale).float()
    g += mean * g.std(0)
    single = BlockFisher({"w": (d,)}, block_size=16)
    for part in g.split(step):
        single.update({"w": part})
    double = fed(g, 16, "float64")
    for damping in DAMPINGS:
        got = single.inverse_diagonals(damping)["w"]
        want = torch.from_numpy(double.inverse_diagonals(damping)["w"].values)
        error = (torch.from_numpy(got.values) / want - 1).abs().reshape(3, 16).amax(1)
        assert got.errors.shape == (3,)
        assert (error <= torch.from_numpy(got.errors)).all()
    # The sums' own error, entry by entry, is the ε of the bound.
    root = double.diagonal()["w"].sqrt().reshape(3, 16)
    scale_ = root[:, :, None] * root[:, None, :]
    difference = (single.blocks("w") - double.blocks("w")).abs() / scale_
    assert difference.max() <= rounding(sums_of(single))


def test_error_bound_is_of_use():
    """It rises as the damping falls, and is far below one per cent where all is well."""
    fisher = fed(gradients(500, (64,)), 32)
    errors = [fisher.inverse_diagonals(damping)["w"].errors.max() for damping in DAMPINGS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    exact = fed(gradients(500, (64,)), 32, "float64").inverse_diagonals(1.0)["w"]
    assert 0 < exact.errors.max() < 1e-12


@pytest.mark.parametrize("damping", [1e-4, 1e-1])
@pytest.mark.parametrize(("n", "block_size"), [(200, 16), (200, None), (6, None)])
def test_kept_masks(n, block_size, damping):
    """The inverse of the kept submatrix, cut out by indexing; one for weights that are out."""
    d = 50
    fisher = fed(gradients(n, (5, 10)), block_size, "float64")
    for share in (0.0, 0.4, 1.0):
        kept = torch.rand(d, generator=torch.Generator().manual_seed(2)) < share
        want = torch.ones(d, dtype=torch.float64)
        size = block_size or d
        for b, block in enumerate(fisher.blocks("w")):
            at = [i for i in range(size) if b * size + i < d and kept[b * size + i]]
            if at:
                inside = block[at][:, at] + damping * torch.eye(len(at), dtype=torch.float64)
                want[[b * size + i for i in at]] = torch.linalg.inv(inside).diagonal()
        got = fisher.inverse_diagonals(damping, {"w": kept.reshape(5, 10)})["w"]
        assert relative(got.values, want) < 1e-9


def test_many_parameters_at_once():
    shapes = {"few": (2, 30), "b": (7,), "a": (130,)}
    g = {name: gradients(60, shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for block_size in (64, None):
        together = BlockFisher(shapes, block_size=block_size)
        together.update(g)
        results = together.inverse_diagonals(0.01)
        assert list(results) == list(shapes)
        for name in shapes:
            alone = fed(g[name], block_size).inverse_diagonals(0.01)["w"]
            assert (results[name].values == alone.values).all()


def test_threads_do_not_matter():
    g = gradients(100, (500,))
    results = []
    for threads in (1, 2, 7):
        fastsal.set_num_threads(threads)
        try:
            for precision in ("float32", "float64"):
                results.append(fed(g, 16, precision).inverse_diagonals(1e-3)["w"].values)
        finally:
            fastsal.set_num_threads(0)
    for precision in (0, 1):
        first, *others = results[precision::2]
        assert all((first == other).all() for other in others)


@pytest.mark.parametrize("damping", [0, -1.0, math.nan, math.inf, "auto", None, True])
def test_dampings_that_are_not_taken(damping):
    with pytest.raises(InvalidArgument, match="^damping must be (positive|a number), got "):
        fed(gradients(3, (4,)), 4).inverse_diagonals(damping)


# Failures.


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine = nn.Parameter(torch.randn(6))
        self.huge = nn.Parameter(torch.randn(6, 5))


@pytest.mark.parametrize("criterion", ["block-fisher", "obs-greedy"])
def test_a_failing_block_names_its_parameter(criterion):
    model = Two()
    g = {name: torch.randn(40, *p.shape) for name, p in model.named_parameters()}
    fisher = BlockFisher({n: p.shape for n, p in model.named_parameters()}, block_size=8)
    fisher.update(g)
    # What a file can hold whose sums have overflowed: F_ii of weight 17, the second of its block.
    sums_of(fisher).parameters["huge"].packed[2 * 36 + 8] = math.inf
    g["huge"].view(40, 30)[:, 17] = 1e20  # its square is past the float32 range
    result = fisher.inverse_diagonals(1.0)
    assert result["fine"].failed == []
    assert np.isfinite(result["fine"].values).all()
    assert result["huge"].failed == [2]
    bad = np.arange(30) // 8 == 2
    assert np.isnan(result["huge"].values[bad]).all()
    assert np.isfinite(result["huge"].values[~bad]).all()
    with pytest.raises(FactorizationError, match=r"1 blocks of 'huge' \(2\).*float64"):
        fastsal.score(model, fisher, criterion, 1.0)
    # The way out that the message gives.
    exact = BlockFisher(fisher.shapes, block_size=8, precision="float64")
    exact.update(g)
    assert exact.inverse_diagonals(1.0)["huge"].failed == []


def test_precision_warning_names_the_parameter():
    model = Two()
    g = {"fine": 1e-4 * torch.randn(40, 6), "huge": 30 * torch.randn(40, 6, 1).expand(40, 6, 5)}
    single, double = (
        BlockFisher({n: p.shape for n, p in model.named_parameters()}, block_size=8, precision=p)
        for p in ("float32", "float64")
    )
    for fisher in (single, double):
        fisher.update(g)
    with pytest.warns(
        PrecisionWarning,
        match="scores of 'huge' may be off by .*precision='float64' or increase damping",
    ):
        fastsal.score(model, single, "block-fisher", 1e-3)
    # Elsewhere warnings of this kind are errors: neither of these gives one.
    fastsal.score(model, single, "block-fisher", 1e2)
    fastsal.score(model, double, "block-fisher", 1e-3)
