"""N:M = the best choice of each group by itself, then exchanges tried one by one, in float64."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastsal
from fastsal import BlockFisher
from fastsal.pruning.masks.patterns import Pattern, input_axes

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS = ("2:4", "1:4", "1:2", "3:5", "4:8", "4:4")


def cost(inverse, theta, out):
    """`θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2`."""
    return float(theta[out] @ np.linalg.solve(inverse[np.ix_(out, out)], theta[out])) / 2


def groups_of(shape, m):
    """Flat places of the members of each group."""
    outer, width, inner = input_axes(shape)
    place = np.arange(outer * width * inner).reshape(outer, width, inner)
    for o, first, i in itertools.product(range(outer), range(0, width, m), range(inner)):
        yield place[o, first : first + m, i].tolist()


def chosen(fisher, name, theta, pattern, damping, *, blocks=None):
    """`(alone, exchanged)`: kept weights by the groups' own costs, and after the exchanges.

    Of the given blocks, or of all; what lies elsewhere counts as kept.
    """
    wanted, shape = Pattern.parse(pattern), fisher.shapes[name]
    dense = fisher.blocks(name).numpy()
    size = dense.shape[1]
    inverse = np.linalg.inv(dense + damping * np.eye(size))
    theta = theta.double().flatten().numpy()
    kept = np.ones(len(theta), dtype=bool)
    numbers = range(len(dense)) if blocks is None else blocks
    pairs = {b: [] for b in numbers}
    for members in groups_of(shape, wanted.m):
        if not {j // size for j in members} & set(numbers):
            continue
        count = len(members) - -(-len(members) * wanted.n // wanted.m)

        def alone(out):
            parts = itertools.groupby(out, lambda j: j // size)
            return sum(
                cost(inverse[b], theta[b * size : (b + 1) * size], [j % size for j in part])
                for b, part in parts
            )

        best = min(itertools.combinations(members, count), key=alone)
        kept[list(best)] = False
        for i, j in itertools.combinations(members, 2):
            if i // size == j // size and i // size in pairs:
                pairs[i // size].append((i % size, j % size))
    start = kept.copy()
    for b in numbers:
        part = slice(b * size, min((b + 1) * size, len(theta)))
        exchange(inverse[b], theta[part], pairs[b], kept[part])
    return start, kept


def exchange(inverse, theta, pairs, kept):
    """Take the best exchange of a block until none lowers its cost."""
    out = np.flatnonzero(~kept).tolist()
    while out:
        now = cost(inverse, theta, out)
        savings = {}
        for i, j in sorted(pairs):
            p, k = (j, i) if kept[i] else (i, j)
            if kept[k] and not kept[p]:
                other = [k if x == p else x for x in out]
                savings[p, k] = now - cost(inverse, theta, other)
        if not savings or max(savings.values()) <= 1e-9 * now:
            return
        p, k = max(savings, key=savings.__getitem__)
        kept[p], kept[k] = True, False
        out = np.flatnonzero(~kept).tolist()


def random_case(shape, n, *, seed=0, block_size=64):
    """A model of one parameter, and statistics of correlated gradients."""
    generator = torch.Generator().manual_seed(seed)
    d = math.prod(shape)
    fisher = BlockFisher({"w": shape}, block_size=block_size, precision="float64")
    mixing = torch.randn(d, d, generator=generator) / math.sqrt(d)
    fisher.update({"w": (torch.randn(n, d, generator=generator) @ mixing).reshape(n, *shape)})
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(shape, generator=generator))
    return model, fisher


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((6, 16), 32), ((3, 8, 3, 3), 64), ((2, 5, 3, 3), 16), ((4, 10), 7), ((3, 6, 2), None),
     ((17,), 64), ((2, 3, 3, 3), 20)],
)  # fmt: skip
def test_random_blocks(shape, block_size, pattern):
    model, fisher = random_case(shape, 100, block_size=block_size)
    alone, expected = chosen(fisher, "w", model.w.detach(), pattern, 0.01)
    masks = fastsal.rank_pattern(model, fisher, pattern, damping=0.01)
    np.testing.assert_array_equal(masks["w"].flatten().numpy(), expected)
    if shape == (6, 16) and pattern in ("2:4", "1:4", "4:8"):
        assert (alone != expected).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 13), st.integers(1, 4), st.sampled_from(PATTERNS))
def test_counts_are_exact_and_no_exchange_is_left(seed, width, inner, pattern):
    model, fisher = random_case((3, width, inner), 40, seed=seed, block_size=11)
    kept = fastsal.rank_pattern(model, fisher, pattern, damping=0.05)["w"].flatten().numpy()
    wanted = Pattern.parse(pattern)
    inverse = np.linalg.inv(fisher.blocks("w").numpy() + 0.05 * np.eye(11))
    theta = model.w.detach().double().flatten().numpy()
    for members in groups_of((3, width, inner), wanted.m):
        assert kept[members].sum() == -(-len(members) * wanted.n // wanted.m)
        for p, k in itertools.permutations(members, 2):
            b = p // 11
            if k // 11 == b and kept[k] and not kept[p]:
                part = slice(b * 11, (b + 1) * 11)
                out = np.flatnonzero(~kept[part]).tolist()
                other = [k % 11 if x == p % 11 else x for x in out]
                now = cost(inverse[b], theta[part], out)
                assert cost(inverse[b], theta[part], other) >= now * (1 - 1e-6)


def test_weights_that_are_zero_already_go():
    model, fisher = random_case((8, 16), 60)
    zeros = fastsal.rank(fastsal.score(model, fisher, "magnitude"), pattern="2:4")
    zeros.apply(model)
    assert fastsal.rank_pattern(model, fisher, "2:4", damping=0.01) == zeros


def test_threads_do_not_matter():
    model, fisher = random_case((6, 8, 3), 60, block_size=10)
    results = []
    for threads in (1, 2, 7):
        fastsal.set_num_threads(threads)
        try:
            results.append(fastsal.rank_pattern(model, fisher, "2:4", damping=0.01))
        finally:
            fastsal.set_num_threads(0)
    assert results[1] == results[0]
    assert results[2] == results[0]


# Real gradients.


@pytest.fixture(scope="module")
def collected(resnet20, cifar10):
    names = ["conv1.weight", "layer2.0.conv1.weight", "linear.weight"]
    return resnet20, fastsal.collect(resnet20, [cifar10("train", 128)], parameters=names)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_real_blocks(collected, pattern):
    model, fisher = collected
    masks = fastsal.rank_pattern(model, fisher, pattern, damping=1e-4)
    weights = dict(model.named_parameters())
    for name in fisher.names:
        blocks = None if name != "layer2.0.conv1.weight" else [0, 1, 7, 71]
        _, expected = chosen(fisher, name, weights[name].detach(), pattern, 1e-4, blocks=blocks)
        kept = masks[name].flatten().numpy()
        for b in range(-(-len(kept) // 64)) if blocks is None else blocks:
            part = slice(64 * b, 64 * (b + 1))
            np.testing.assert_array_equal(kept[part], expected[part], err_msg=f"{name}, block {b}")


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_less_loss_is_predicted_than_for_groups_by_themselves(collected, pattern):
    model, fisher = collected
    masks = fastsal.rank_pattern(model, fisher, pattern, damping=1e-4)
    for name in ("conv1.weight", "linear.weight"):
        weights = dict(model.named_parameters())[name].detach()
        alone = torch.from_numpy(chosen(fisher, name, weights, pattern, 1e-4)[0])
        both = [{name: masks[name]}, {name: alone.reshape(weights.shape)}]
        after = [fastsal.compensate(copy.deepcopy(model), fisher, m, 1e-4).total for m in both]
        assert after[0] < after[1]
