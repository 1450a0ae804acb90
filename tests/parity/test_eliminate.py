"""Greedy elimination = the same steps, one at a time, in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastsal
from fastsal import BlockFisher, _core
from fastsal.fisher.block_fisher import sums_of
from fastsal.pruning.masks.masks import Masks

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


def eliminate(a, theta, kept=None):
    """Costs (running maximum) and order of a block `A` `[B, B]` and its weights `[B]`.

    Remove the weight with the least `θ_j² / (2 [A⁻¹]_jj)`, move the others by
    `-A⁻¹e_j θ_j / [A⁻¹]_jj`, and invert what is left of `A` anew.
    """
    theta = theta.double().clone()
    left = [j for j in range(len(theta)) if kept is None or kept[j]]
    scores = torch.full((len(theta),), -math.inf, dtype=torch.float64)
    order, highest = [], 0.0
    while left:
        inverse = torch.linalg.inv(a[left][:, left])
        costs = theta[left].square() / (2 * inverse.diagonal())
        i = int(costs.argmin())
        highest = max(highest, float(costs[i]))
        scores[left[i]] = highest
        theta[left] -= inverse[:, i] * theta[left[i]] / inverse[i, i]
        order.append(left.pop(i))
    return scores, order


def turns_of(fisher, weights, damping, kept=None):
    """`(scores, turns)` of the core, which numbers weights in the order of their going."""
    parameters, size = sums_of(fisher).all_for_core(kept)
    flat = [weights[name].reshape(-1).numpy() for name in fisher.names]
    results = _core.eliminate(parameters, flat, size, damping)
    inverses = _core.inverse_diagonal(parameters, size, damping)
    for (*_, failed, sensitivity), (_, _, expected) in zip(results, inverses, strict=True):
        assert failed == []
        np.testing.assert_allclose(sensitivity, expected, rtol=1e-9)
    return {n: (s, t) for n, (s, t, *_) in zip(fisher.names, results, strict=True)}


def check(fisher, weights, damping, kept=None, blocks=None):
    """Compare all blocks, or those of the given numbers."""
    found = turns_of(fisher, weights, damping, kept)
    for name, (scores, turns) in found.items():
        dense = fisher.blocks(name)
        size = min(dense.shape[-1], len(scores))
        theta = weights[name].reshape(-1)
        mask = None if kept is None else kept[name].reshape(-1)
        for b in range(len(dense)) if blocks is None else blocks:
            part = slice(b * size, min((b + 1) * size, len(theta)))
            n = part.stop - part.start
            a = dense[b, :n, :n] + damping * torch.eye(n, dtype=torch.float64)
            some = None if mask is None else mask[part]
            want, order = eliminate(a, theta[part], some)
            out = n - len(order)
            went = np.argsort(turns[part], kind="stable")
            if some is not None:
                assert (turns[part][~some.numpy()] == 0).all()
                went = [j for j in went if some[j]]
            assert [int(j) for j in went] == order, f"{name} block {b}"
            assert sorted(turns[part][order].tolist()) == list(range(out, n))
            torch.testing.assert_close(
                torch.from_numpy(scores[part]).double(), want, rtol=1e-5, atol=1e-37
            )


def random_case(shapes, n, *, seed=0, block_size=64, precision="float32"):
    generator = torch.Generator().manual_seed(seed)
    fisher = BlockFisher(shapes, block_size=block_size, precision=precision)
    gradients, weights = {}, {}
    for name, shape in shapes.items():
        d = math.prod(shape)
        mixing = torch.randn(d, d, generator=generator) / math.sqrt(d)
        g = torch.randn(n, d, generator=generator) @ mixing
        gradients[name] = g.reshape(n, *shape)
        weights[name] = torch.randn(shape, generator=generator)
    fisher.update(gradients)
    return fisher, weights


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(
    ("shape", "block_size", "n"),
    [((1,), 64, 5), ((5,), 1, 9), ((4, 3, 3, 3), 64, 200), ((70,), 7, 30), ((6, 15), None, 150),
     ((6, 15), None, 12), ((17,), 1000, 60)],
)  # fmt: skip
def test_random_blocks(shape, block_size, n, damping):
    fisher, weights = random_case({"w": shape}, n, block_size=block_size)
    check(fisher, weights, damping)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 24), st.integers(2, 60), st.floats(0.0, 1.0))
def test_random_blocks_and_masks(seed, d, n, share):
    fisher, weights = random_case({"w": (d,)}, n, seed=seed, block_size=9, precision="float64")
    kept = torch.rand(d, generator=torch.Generator().manual_seed(seed)) < share
    check(fisher, weights, 0.05, {"w": kept})


def test_several_parameters_and_a_mask_for_one():
    shapes = {"b": (3, 7), "a": (40,)}
    fisher, weights = random_case(shapes, 80, block_size=16)
    kept = {"b": torch.rand(3, 7) < 0.5}
    with_ones = {**kept, "a": torch.ones(40, dtype=torch.bool)}
    check(fisher, weights, 0.01, with_ones)
    scores, _ = turns_of(fisher, weights, 0.01, kept)["a"]
    assert (scores == turns_of(fisher, weights, 0.01)["a"][0]).all()


def test_criterion_is_the_elimination():
    fisher, weights = random_case({"w": (4, 3, 3, 3)}, 100)
    model = nn.Module()
    model.w = nn.Parameter(weights["w"].to(memory_format=torch.channels_last))
    masks = Masks({"w": torch.rand(4, 3, 3, 3) < 0.7})
    for some in (None, masks):
        got = fastsal.score(model, fisher, "obs-greedy", 0.01, masks=some)["w"]
        scores, _ = turns_of(fisher, weights, 0.01, some)["w"]
        assert got.dtype == torch.float32
        assert torch.equal(got.reshape(-1), torch.from_numpy(scores))
        if some is not None:
            assert torch.equal(got == -math.inf, ~some["w"])


def test_a_threshold_cuts_each_block_at_a_prefix_of_its_order():
    fisher, weights = random_case({"w": (200,)}, 300, block_size=16)
    scores, turns = turns_of(fisher, weights, 0.01)["w"]
    for start in range(0, 200, 16):
        in_order = scores[start : start + 16][np.argsort(turns[start : start + 16])]
        assert (np.diff(in_order) >= 0).all()


def test_the_last_cost_adds_up_to_the_joint_increase():
    """What greedy elimination of a prefix predicts is what joint compensation of it costs."""
    fisher, weights = random_case({"w": (24,)}, 90, precision="float64")
    a = fisher.blocks("w")[0, :24, :24] + 0.05 * torch.eye(24, dtype=torch.float64)
    theta = weights["w"].double()
    _, turns = turns_of(fisher, weights, 0.05)["w"]
    went = np.argsort(turns)
    left, total, current = list(range(24)), 0.0, theta.clone()
    for count, j in enumerate(int(j) for j in went[:12]):
        inverse = torch.linalg.inv(a[left][:, left])
        i = left.index(j)
        total += float(current[j] ** 2 / (2 * inverse[i, i]))
        current[left] -= inverse[:, i] * current[j] / inverse[i, i]
        left.remove(j)
        model = nn.Module()
        model.w = nn.Parameter(weights["w"].clone())
        mask = torch.ones(24, dtype=torch.bool)
        mask[went[: count + 1].copy()] = False
        report = fastsal.compensate(model, fisher, {"w": mask}, 0.05)
        assert report.total == pytest.approx(total, rel=1e-6)
        torch.testing.assert_close(
            model.w.detach().double()[mask], current[mask], rtol=1e-5, atol=1e-6
        )


def test_threads_do_not_matter():
    fisher, weights = random_case({"w": (300,), "v": (5, 5)}, 60)
    results = []
    for threads in (1, 2, 7):
        fastsal.set_num_threads(threads)
        try:
            results.append(turns_of(fisher, weights, 0.01))
        finally:
            fastsal.set_num_threads(0)
    for other in results[1:]:
        for name in ("w", "v"):
            assert (other[name][0] == results[0][name][0]).all()
            assert (other[name][1] == results[0][name][1]).all()


def test_zero_weights_go_first():
    fisher, weights = random_case({"w": (20,)}, 40)
    weights["w"][[3, 11, 12]] = 0
    scores, turns = turns_of(fisher, weights, 0.01)["w"]
    assert sorted(int(turns[j]) for j in (3, 11, 12)) == [0, 1, 2]
    assert (scores[[3, 11, 12]] == 0).all()
    assert (np.delete(scores, [3, 11, 12]) > 0).all()


# Real gradients.


@pytest.fixture(scope="module")
def collected(resnet20, cifar10):
    names = ["conv1.weight", "layer2.0.conv1.weight", "linear.weight"]
    fisher = fastsal.collect(resnet20, [cifar10("train", 128)], parameters=names)
    owned = dict(resnet20.named_parameters())
    return fisher, {name: owned[name].detach() for name in names}


@pytest.mark.parametrize(("damping", "masked"), [(1e-5, False), (1e-3, True)])
def test_real_blocks(collected, damping, masked):
    fisher, weights = collected
    kept = None
    if masked:
        generator = torch.Generator().manual_seed(0)
        kept = {n: torch.rand(w.shape, generator=generator) < 0.6 for n, w in weights.items()}
    check(fisher, weights, damping, kept, blocks=[0, 5])


def test_precision_warning_names_the_parameter():
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.ones(64))
    fisher = fastsal.BlockFisher({"w": (64,)})
    # Gradients in a subspace, so that the inverse is as large as the damping lets it be.
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(10, 64, generator=generator)
    fisher.update({"w": torch.randn(200, 10, generator=generator) @ directions})
    with pytest.warns(fastsal.PrecisionWarning, match="'w'"):
        fastsal.score(model, fisher, "obs-greedy", 1e-4)
