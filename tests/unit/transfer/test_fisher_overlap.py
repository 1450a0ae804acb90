"""Overlap of two Fishers = a loop over blocks."""

from __future__ import annotations

import pytest
import torch

from fastsal import BlockFisher
from fastsal.errors import InvalidArgument
from fastsal.transfer.fisher_overlap import fisher_overlap

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"a": (4, 7), "b": (3,), "c": (10,)}


def fed(n, seed, block_size=8, keep=None, precision="float64"):
    generator = torch.Generator().manual_seed(seed)
    fisher = BlockFisher(SHAPES, block_size=block_size, precision=precision)
    rows = {}
    for name, shape in SHAPES.items():
        g = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        g = g * torch.rand(shape, generator=generator, dtype=torch.float64)
        if keep is not None:
            flat = g.reshape(n, -1)
            flat[:, torch.arange(flat.shape[1]) % 2 != keep] = 0
        rows[name] = g
    fisher.update(rows)
    return fisher


def slow(a, b, name, k):
    """Mean over whole blocks of the squared cosines, by traces."""
    x, y = a.diagonal()[name].flatten(), b.diagonal()[name].flatten()
    cosine = float(x @ y / (x @ x).sqrt() / (y @ y).sqrt())
    A, B = a.blocks(name), b.blocks(name)
    ta = sum(float(f.trace()) for f in A)
    tb = sum(float(f.trace()) for f in B)
    total = weight = 0.0
    for i, (f, g) in enumerate(zip(A, B)):
        size = min(f.shape[0], x.numel() - i * f.shape[0])
        if size <= k:
            continue
        u = torch.linalg.svd(f[:size, :size])[0][:, :k]
        v = torch.linalg.svd(g[:size, :size])[0][:, :k]
        share = (float(f.trace()) / ta + float(g.trace()) / tb) / 2
        total += share * float((u.T @ v).square().sum()) / k
        weight += share
    return cosine, total / weight if weight else None


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("block_size", [8, None, 28])
def test_overlap_equals_a_loop(k, block_size):
    a, b = fed(60, 0, block_size), fed(45, 1, block_size)
    found = fisher_overlap(a, b, k)
    assert [(o.layer, o.position) for o in found] == [("a", 0), ("b", 1), ("c", 2)]
    for overlap in found:
        diagonal, eigenspace = slow(a, b, overlap.layer, k)
        assert overlap.diagonal == pytest.approx(diagonal, rel=1e-9)
        if eigenspace is None:
            assert overlap.eigenspace is None
        else:
            assert overlap.eigenspace == pytest.approx(eigenspace, rel=1e-7)
        assert (overlap.eigenspace is None) == (overlap.layer == "b" and k == 4)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 3, 50])
def test_equal_fishers_overlap_wholly_whatever_their_rank(n, precision):
    a = fed(n, 0, precision=precision)
    twice = fed(n, 0, precision=precision)
    twice.merge(a, 2.5)  # the same mean, more samples
    for overlap in fisher_overlap(a, twice):
        assert overlap.diagonal == pytest.approx(1, abs=1e-6)
        if overlap.layer != "b":
            assert overlap.eigenspace == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_disjoint_supports_do_not_overlap(n):
    for overlap in fisher_overlap(fed(n, 0, keep=0), fed(n, 1, keep=1), k=2):
        assert overlap.diagonal == 0
        assert overlap.eigenspace == pytest.approx(0, abs=1e-12)


def test_overlap_is_symmetric_and_between_zero_and_one():
    a, b = fed(9, 3), fed(30, 4)
    for one, other in zip(fisher_overlap(a, b), fisher_overlap(b, a)):
        assert one.diagonal == pytest.approx(other.diagonal)
        assert one.eigenspace is None or one.eigenspace == pytest.approx(other.eigenspace)
        assert 0 < one.diagonal < 1
        assert one.eigenspace is None or 0 < one.eigenspace < 1


def test_blocks_without_curvature_are_left_out():
    a, b = fed(20, 0), fed(20, 1)
    dead = BlockFisher(SHAPES, block_size=8, precision="float64")
    dead.update({name: torch.zeros(20, *shape) for name, shape in SHAPES.items()})
    for overlap in fisher_overlap(a, dead):
        assert (overlap.diagonal, overlap.eigenspace) == (0, None)
    # Half of the blocks of "a" are dead in both: the others count alone.
    rows = torch.randn(20, 28, dtype=torch.float64)
    rows[:, 16:] = 0
    for fisher, seed in ((a, 0), (b, 1)):
        fisher.__init__(SHAPES, block_size=8, precision="float64")
        generator = torch.Generator().manual_seed(seed)
        rows[:, :16] = torch.randn(20, 16, generator=generator, dtype=torch.float64)
        others = {n: torch.ones(20, *SHAPES[n]) for n in ("b", "c")}
        fisher.update({"a": rows.reshape(20, 4, 7), **others})
    whole = fisher_overlap(a, b)[0].eigenspace
    A, B = a.blocks("a")[:2], b.blocks("a")[:2]
    us, vs = torch.linalg.eigh(A)[1][:, :, -4:], torch.linalg.eigh(B)[1][:, :, -4:]
    each = (us.transpose(1, 2) @ vs).square().sum((1, 2)) / 4
    shares = sum(F.diagonal(dim1=1, dim2=2).sum(1) / F.diagonal(dim1=1, dim2=2).sum()
                 for F in (A, B)) / 2  # fmt: skip
    assert whole == pytest.approx(float(shares @ each))


def test_what_is_not_taken():
    a = fed(5, 0)
    for k in (0, -1, 1.5, True):
        with pytest.raises(InvalidArgument, match="^k must be"):
            fisher_overlap(a, a, k)
    with pytest.raises(
        InvalidArgument, match="^target must have the parameters, shapes and block size"
    ):
        fisher_overlap(a, fed(5, 0, block_size=4))
    with pytest.raises(InvalidArgument, match="has no samples"):
        fisher_overlap(a, BlockFisher(SHAPES, block_size=8))
