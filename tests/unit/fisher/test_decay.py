"""Statistics that forget = a sum with weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsal import BlockFisher, collect
from fastsal.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"a": (5, 4), "b": (7,)}
BLOCK = 9


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(n, *shape, generator=generator, dtype=torch.float64) + 0.2
        for name, shape in SHAPES.items()
    }


def empty(precision="float64", block_size=BLOCK):
    return BlockFisher(SHAPES, block_size=block_size, precision=precision)


def weighted(parts, weights, name):
    """`sum w g gᵀ / sum w` of flattened rows, and the mean gradient."""
    g = torch.cat([part[name].flatten(1) for part in parts])
    w = torch.cat(
        [torch.full((len(p[name]),), float(x), dtype=torch.float64) for p, x in zip(parts, weights)]
    )
    return (g.T * w) @ g / w.sum(), (w[:, None] * g).sum(0) / w.sum(), float(w.sum())


def assert_weighted(fisher, parts, weights, tolerance=1e-12):
    for name in SHAPES:
        want, mean, total = weighted(parts, weights, name)
        d, size = len(want), fisher.block_size or len(want)
        assert fisher.samples == pytest.approx(total, rel=1e-12)
        for b, block in enumerate(fisher.blocks(name)):
            part = slice(b * size, min((b + 1) * size, d))
            n = part.stop - part.start
            torch.testing.assert_close(
                block[:n, :n], want[part, part], rtol=tolerance, atol=tolerance
            )
        torch.testing.assert_close(
            fisher.diagonal()[name].flatten(), want.diagonal(), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            fisher.mean_gradient()[name].flatten(), mean, rtol=tolerance, atol=tolerance
        )


# A block of 9 keeps gradients themselves up to 5 samples; a whole parameter of 20 up to 10.
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    factor=st.floats(0.05, 1.0),
    block_size=st.sampled_from([BLOCK, None]),
    merges=st.booleans(),
)
def test_a_stream_is_the_exponentially_weighted_sum(sizes, factor, block_size, merges):
    parts = [rows(n, i) for i, n in enumerate(sizes)]
    fisher = empty(block_size=block_size)
    for part in parts:
        fisher.decay(factor)
        if merges:
            new = empty(block_size=block_size)
            new.update(part)
            fisher.merge(new)
        else:
            fisher.update(part)
    weights = [factor ** (len(parts) - 1 - i) for i in range(len(parts))]
    assert_weighted(fisher, parts, weights)


@pytest.mark.parametrize("n", [3, 40])
def test_inverses_and_scores_after_weights_are_those_of_the_weighted_sum(n):
    parts = [rows(n, 0), rows(n, 1)]
    fisher = empty()
    fisher.update(parts[0])
    fisher.decay(0.3)
    other = empty()
    other.update(parts[1])
    fisher.merge(other, 1.7)
    inverses = fisher.inverse_diagonals(0.05)
    for name in SHAPES:
        F = weighted(parts, [0.3, 1.7], name)[0]
        want = []
        for start in range(0, len(F), BLOCK):
            block = F[start : start + BLOCK, start : start + BLOCK]
            want.append(torch.linalg.inv(block + 0.05 * torch.eye(len(block)).double()).diagonal())
        torch.testing.assert_close(
            torch.from_numpy(inverses[name].values), torch.cat(want), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("n", [3, 40])
def test_decay_alone_changes_samples_and_no_mean(n):
    fisher = empty("float32")
    fisher.update(rows(n, 0))
    before = {name: fisher.blocks(name) for name in SHAPES}
    for _ in range(200):
        fisher.decay(0.9)
    assert fisher.samples == pytest.approx(n * 0.9**200, rel=1e-12)
    for name in SHAPES:
        # 200 roundings of float32.
        torch.testing.assert_close(fisher.blocks(name), before[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("n", [3, 40])
def test_a_file_keeps_the_weights(tmp_path, n):
    fisher = empty("float32")
    fisher.update(rows(n, 0))
    fisher.decay(0.37)
    fisher.save(tmp_path / "f.safetensors")
    loaded = BlockFisher.load(tmp_path / "f.safetensors")
    for f in (fisher, loaded):
        f.decay(0.5)
        f.update(rows(4, 1))
    assert loaded.samples == fisher.samples == pytest.approx(n * 0.37 * 0.5 + 4)
    for name in SHAPES:
        assert torch.equal(loaded.blocks(name), fisher.blocks(name))


def test_a_stream_of_images():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).double()
    steps = [(torch.randn(6, 3, 2, 2).double(), torch.arange(6) % 3) for _ in range(3)]
    stream = BlockFisher({"1.weight": (3, 12)}, block_size=6, precision="float64")
    want = 0
    for k, step in enumerate(steps):
        new = collect(model, [step], block_size=6, precision="float64")
        stream.decay(0.5)
        stream.merge(new)
        want = want + 0.5 ** (2 - k) * 6 * new.blocks("1.weight")
    assert stream.samples == 6 * 1.75
    torch.testing.assert_close(stream.blocks("1.weight"), want / (6 * 1.75))


@pytest.mark.parametrize("factor", [0, -0.5, 1.01, math.nan, math.inf, "1", None, True])
def test_factors_that_are_not_taken(factor):
    fisher = empty()
    fisher.update(rows(3, 0))
    with pytest.raises(InvalidArgument, match=r"^factor must be (in \(0, 1\]|a number), got"):
        fisher.decay(factor)
    assert fisher.samples == 3


def test_samples_that_come_to_nothing_are_refused():
    fisher = empty("float32")
    fisher.update(rows(3, 0))
    with pytest.raises(
        InvalidArgument, match="^factor must leave .*, got 1e-40, which leaves 3e-40"
    ):
        fisher.decay(1e-40)
    assert_weighted(fisher, [rows(3, 0)], [1], tolerance=1e-6)
    empty().decay(0.5)  # nothing to forget
