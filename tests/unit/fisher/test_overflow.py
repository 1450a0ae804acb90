"""Finite gradients whose squares, or the sums of these, are beyond the range of the sums."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastsal
from fastsal import BlockFisher
from fastsal.errors import DataError, GradientOverflow, NonFiniteGradient

SHAPES = {"a": (3, 4), "w": (5, 40)}


def rows(n, at=None, value=1e20, dtype=torch.float32):
    """Gradients of `n` samples; `value` at sample and place `at` of `w`."""
    generator = torch.Generator().manual_seed(n)
    grads = {k: torch.randn(n, *s, generator=generator).to(dtype) for k, s in SHAPES.items()}
    if at is not None:
        grads["w"][at] = value
    return grads


def state(fisher):
    parts = [fisher.diagonal(), fisher.mean_gradient()]
    blocks = {name: fisher.blocks(name) for name in SHAPES}
    return fisher.samples, *({k: v.clone() for k, v in x.items()} for x in (*parts, blocks))


def check_same(before, after):
    assert before[0] == after[0]
    for a, b in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("held", [0, 2, 40])
@pytest.mark.parametrize("n", [3, 30])
def test_a_square_that_overflows_is_refused_and_named(dtype, held, n):
    # Gradients are kept up to eight samples, and summed in blocks from there.
    fisher = BlockFisher(SHAPES, block_size=16)
    if held:
        fisher.update(rows(held))
        before = state(fisher)
    place = rf"for 'w', sample {held + 1}, at \[2, 7\]; nothing was accumulated \(scale the loss"
    with pytest.raises(GradientOverflow, match=place) as error:
        fisher.update(rows(n, (1, 2, 7), dtype=dtype))
    assert isinstance(error.value, DataError)
    assert isinstance(error.value, NonFiniteGradient)
    assert fisher.samples == held
    if held:
        check_same(before, state(fisher))
    fisher.update(rows(n))
    reference = BlockFisher(SHAPES, block_size=16)
    if held:
        reference.update(rows(held))
    reference.update(rows(n))
    check_same(state(reference), state(fisher))


@pytest.mark.parametrize("n", [2, 30])
def test_float64_sums_take_the_same_gradients(n):
    fisher = BlockFisher(SHAPES, block_size=16, precision="float64")
    given = rows(n, (1, 2, 7))
    fisher.update(given)
    exact = given["w"].double().square().mean(0)
    assert torch.allclose(fisher.diagonal()["w"], exact, rtol=1e-12)
    with pytest.raises(GradientOverflow, match=r"fit float64, got a gradient of -1e\+160"):
        fisher.update(rows(n, (0, 0, 0), -1e160, torch.float64))


def test_a_sum_of_squares_that_overflows_is_refused():
    fisher = BlockFisher(SHAPES, block_size=16)
    fisher.update(rows(30, (slice(None), 0, 0), 2e18))
    before = state(fisher)
    with pytest.raises(GradientOverflow, match=r"'w', sample 30, at \[0, 0\]"):
        fisher.update(rows(60, (slice(None), 0, 0), 2e18))
    check_same(before, state(fisher))
    # The same samples over another weight are no trouble.
    fisher.update(rows(60, (slice(None), 0, 1), 2e18))
    assert fisher.diagonal()["w"].isfinite().all()


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_merged_sums_that_overflow_are_refused(weight):
    one, other = (BlockFisher(SHAPES, block_size=16) for _ in range(2))
    one.update(rows(40, (slice(None), 0, 0), 2e18))
    other.update(rows(1, (0, 0, 0), 1.5e19 / weight**0.5))
    before = state(one)
    with pytest.raises(GradientOverflow, match="those of 'w' would overflow; nothing was added"):
        one.merge(other, weight)
    check_same(before, state(one))
    one.merge(other, weight / 100)
    assert one.diagonal()["w"].isfinite().all()


def test_statistics_of_a_file_that_have_overflowed_are_refused(tmp_path):
    from safetensors.torch import load_file

    fisher = BlockFisher({"w": (40,)}, block_size=8)
    fisher.update({"w": torch.randn(30, 40)})
    fisher.save(tmp_path / "fine.safetensors")
    assert load_file(tmp_path / "fine.safetensors")
    loaded = BlockFisher.load(tmp_path / "fine.safetensors")
    for p in fastsal.fisher.block_fisher.sums_of(loaded).parameters.values():
        p.own()
        p.packed[0] = float("inf")
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(40))
    for use in (
        loaded.diagonal,
        lambda: loaded.blocks("w"),
        lambda: fastsal.score(model, loaded, "diag-fisher"),
    ):
        with pytest.raises(GradientOverflow, match="statistics of 'w' must be finite"):
            use()


@pytest.mark.parametrize("n", [3, 30])
@pytest.mark.parametrize("criterion", ["diag-fisher", "block-fisher", "obs-greedy"])
def test_scores_beyond_float32_are_refused(n, criterion):
    fisher = BlockFisher(SHAPES, block_size=16)
    fisher.update(rows(n, (0, 1, 1), 1e19))
    model = nn.Module()
    for name, size in (("a", 1e-9), ("w", 1e3)):
        setattr(model, name, nn.Parameter(torch.full(SHAPES[name], size)))
    with pytest.raises(DataError, match="scores of 'w' must fit float32"):
        fastsal.score(model, fisher, criterion, damping=1e36)
    with torch.no_grad():
        model.w.mul_(1e-4)
    scores = fastsal.score(model, fisher, criterion, damping=1e36)
    assert all(s.isfinite().all() for s in scores.values())


def test_collect_names_the_parameter_and_the_sample():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    nn.init.zeros_(model[1].weight)
    images, labels = torch.randn(12, 1, 2, 2), torch.arange(12) % 3
    images[7] *= 1e21
    with pytest.raises(GradientOverflow, match=r"'1.weight', sample 7"):
        fastsal.collect(model, [(images, labels)], block_size=4)


@pytest.mark.parametrize("n", [2, 30])
def test_squares_that_all_underflow_are_told(n):
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(5, 40))
    warned = []
    for precision, scale in (("float32", 1e-30), ("float64", 1e-30), ("float32", 0.0)):
        fisher = BlockFisher({"w": (5, 40)}, block_size=4, precision=precision)
        fisher.update({"w": scale * torch.randn(n, 5, 40)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fastsal.score(model, fisher)
        warned.append(any("underflow float32" in str(w.message) for w in caught))
    # Gradients of a few samples are kept as they are.
    assert warned == [n == 30, False, False]
