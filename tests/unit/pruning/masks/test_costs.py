"""Pruning a fraction of the cost of weights, against a plain loop over sorted scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsal
from fastsal.errors import InvalidArgument

SIZES = {"a": 40, "b": 7, "c": 23}


def drawn(seed: int, ties: bool = False):
    generator = np.random.default_rng(seed)
    scores = {name: generator.random(size).astype(np.float32) for name, size in SIZES.items()}
    if ties:
        scores = {name: np.round(values * 4).astype(np.float32) for name, values in scores.items()}
    return {name: torch.from_numpy(values) for name, values in scores.items()}


def plain(scores, costs, sparsity, floor=0.0):
    """Prune in the order of score per cost until the cost is reached, to the nearest weight."""
    total = sum(costs[name] * len(values) for name, values in scores.items())
    mean = total / sum(map(len, scores.values()))
    priced = [
        (float(value / np.float32(costs[name] / mean)), number, place, name)
        for number, (name, values) in enumerate(scores.items())
        for place, value in enumerate(values.numpy())
        if costs[name]
    ]
    most = {name: len(v) - int(np.ceil(floor * len(v) - 1e-9)) for name, v in scores.items()}
    kept = {name: torch.ones(len(values), dtype=torch.bool) for name, values in scores.items()}
    spent, done = 0.0, dict.fromkeys(scores, 0)
    for _, _, place, name in sorted(priced):
        if done[name] == most[name]:
            continue
        if sparsity * total - spent <= costs[name] / 2 + 1e-9:
            break
        kept[name][place] = False
        spent += costs[name]
        done[name] += 1
    return kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.13, 0.5, 0.63])
def test_equals_a_plain_loop(seed, sparsity, floor):
    costs = {"a": 3.0, "b": 50.0, "c": 10.0}
    scores = drawn(seed)
    masks = fastsal.rank(scores, sparsity, costs=costs, floor=floor)
    expected = plain(scores, costs, sparsity, floor)
    assert all(bool((masks[name] == expected[name]).all()) for name in SIZES)


@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_equal_costs_are_the_number_of_weights(seed, sparsity, ties):
    if abs((sparsity * 70) % 1 - 0.5) < 1e-6:
        return  # a half, which is rounded to an even number
    scores = drawn(seed, ties)
    masks = fastsal.rank(scores, sparsity, costs=dict.fromkeys(SIZES, 7.0))
    assert masks == fastsal.rank(scores, sparsity)


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 0.5), st.booleans())
def test_cost_is_met_and_grows(seed, sparsity, floor, ties):
    costs = {"a": 1.0, "b": 4.0, "c": 2.5}
    total = sum(costs[name] * size for name, size in SIZES.items())
    scores = drawn(seed, ties)
    reachable = sum(costs[n] * (s - int(np.ceil(floor * s))) for n, s in SIZES.items()) / total
    sparsity = min(sparsity, reachable)
    masks = fastsal.rank(scores, sparsity, costs=costs, floor=floor)
    pruned = sum(costs[name] * int((~masks[name]).sum()) for name in SIZES)
    assert abs(pruned - sparsity * total) <= max(costs.values()) / 2 + 1e-9
    assert all(masks.kept[name] >= floor * SIZES[name] - 1e-9 for name in SIZES)
    less = fastsal.rank(scores, sparsity / 2, costs=costs, floor=floor)
    assert all(bool((less[name] | ~masks[name]).all()) for name in SIZES)


def test_unit_of_the_costs_does_not_matter():
    costs = {"a": 3.0, "b": 50.0, "c": 10.0}
    one = fastsal.rank(drawn(1), 0.4, costs=costs)
    assert one == fastsal.rank(drawn(1), 0.4, costs={n: 2.0**40 * c for n, c in costs.items()})
    assert one == fastsal.rank(drawn(1), 0.4, costs={n: 2.0**-40 * c for n, c in costs.items()})


def test_weights_that_cost_nothing_are_kept():
    masks = fastsal.rank(drawn(2), 1.0, costs={"a": 0, "b": 1, "c": 2})
    assert masks.kept == {"a": SIZES["a"], "b": 0, "c": 0}


def test_recipe():
    costs = {"a": 1, "b": 4, "c": 2}
    masks = fastsal.rank(drawn(3), 0.5, costs=costs)
    assert masks.recipe["costs"] == costs
    total = sum(costs[name] * size for name, size in SIZES.items())
    highest = max(float(drawn(3)[n][~masks[n]].max()) / costs[n] for n in SIZES)
    assert masks.recipe["threshold"] == pytest.approx(highest, rel=1e-6)
    assert total == 114


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"costs": {"a": 1, "b": 1}}, "costs must have every parameter of the scores, not 'c'"),
        ({"costs": dict.fromkeys(SIZES, 0)}, "costs must not all be zero"),
        ({"costs": {"a": 1, "b": -1, "c": 1}}, r"costs\['b'\] must be at least 0, got -1"),
        ({"costs": {"a": 1, "b": "x", "c": 1}}, r"costs\['b'\] must be a number, got 'x'"),
        ({"costs": [1, 2, 3]}, "costs must be a mapping from names of parameters to numbers"),
        ({"scope": "layer"}, "scope must be 'global' with costs, got 'layer'"),
        ({"pattern": "1x4"}, "pattern must be None with costs, got '1x4'"),
        ({"floor": 0.8}, "sparsity must be at most 0.1.* of the costs"),
    ],
)
def test_invalid_costs(given_, message):
    options = {"costs": {"a": 1, "b": 4, "c": 2}, **given_}
    with pytest.raises(InvalidArgument, match=message):
        fastsal.rank(drawn(4), 0.5, **options)
