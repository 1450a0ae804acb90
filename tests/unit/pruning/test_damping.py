"""Damping as a number, a multiple of the mean diagonal of F, or chosen: one parser for all."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import fastsal
from fastsal.errors import InvalidArgument
from fastsal.pruning.damping import Multiple, candidates, mean_diagonal, parse_damping

from ..small_net import net

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    images, labels = torch.randn(48, 3, 8, 8), torch.randint(0, 10, (48,))
    return [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 48, 16)]


@pytest.fixture(scope="module")
def fisher(batches):
    return fastsal.collect(net(), batches)


def by_hand(fisher, factor):
    """The absolute value, from the diagonal alone."""
    diagonal = fisher.diagonal().values()
    total = sum(float(d.sum()) for d in diagonal)
    return factor * (total / sum(d.numel() for d in diagonal))


def assert_equal(found, expected):
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (1e-5, 1e-5),
        (1, 1.0),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (torch.tensor(0.25), 0.25),
        ("0.1x", Multiple(0.1)),
        (" 3X ", Multiple(3.0)),
        ("1e-2×", Multiple(0.01)),
        (Multiple(0.2), Multiple(0.2)),
    ],
)
@pytest.mark.parametrize("auto", [True, False])
def test_what_is_parsed(given, parsed, auto):
    found = parse_damping(given, auto=auto)
    assert found == parsed
    assert type(found) is type(parsed)
    if isinstance(parsed, Multiple):
        assert parse_damping(str(parsed)) == parsed


def test_auto_is_valid_only_where_it_can_be_chosen():
    assert parse_damping("auto", auto=True) == "auto"
    with pytest.raises(InvalidArgument) as caught:
        parse_damping("best", auto=True)
    assert str(caught.value) == (
        "damping must be a positive number, 'auto' or a multiple such as '0.1x', got 'best'"
    )
    with pytest.raises(InvalidArgument) as caught:
        parse_damping("auto")
    assert str(caught.value) == (
        "damping must be a positive number or a multiple such as '0.1x', got 'auto'"
    )


@pytest.mark.parametrize("factor", [0.1, 3.0])
@pytest.mark.parametrize("criterion", ["block-fisher", "obs-greedy"])
def test_score_equals_that_of_the_absolute_number(fisher, criterion, factor):
    found = fastsal.score(net(), fisher, criterion, f"{factor}x")
    assert_equal(found, fastsal.score(net(), fisher, criterion, by_hand(fisher, factor)))


def test_compensate_equals_that_of_the_absolute_number(fisher):
    models = [net(), net()]
    masks = fastsal.rank(fastsal.score(net(), None, "magnitude"), 0.6)
    absolute = by_hand(fisher, 0.3)
    reports = [
        fastsal.compensate(model, fisher, masks, damping)
        for model, damping in zip(models, ["0.3x", absolute], strict=True)
    ]
    assert reports[0] == reports[1]
    assert reports[0].damping == absolute
    assert_equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("pattern", ["2:4", "1x4"])
def test_rank_pattern_equals_that_of_the_absolute_number(fisher, pattern):
    sparsity = 0.5
    found = fastsal.rank_pattern(net(), fisher, pattern, sparsity, "0.3x")
    expected = fastsal.rank_pattern(net(), fisher, pattern, sparsity, by_hand(fisher, 0.3))
    assert found == expected
    assert found.recipe == expected.recipe
    assert found.recipe["damping"] == by_hand(fisher, 0.3)


def test_defaults_are_a_multiple(fisher):
    assert_equal(fastsal.score(net(), fisher), fastsal.score(net(), fisher, damping="0.1x"))
    masks = fastsal.rank(fastsal.score(net(), None, "magnitude"), 0.6)
    absolute = by_hand(fisher, 0.1)
    assert fastsal.compensate(net(), fisher, masks).damping == absolute
    assert fastsal.rank_pattern(net(), fisher, "2:4").recipe["damping"] == absolute


@pytest.mark.parametrize("arguments", [{}, {"rounds": 3}, {"memory_budget": "102MiB"}])
def test_prune_uses_the_statistics_of_each_round(batches, arguments):
    model, other = net(), net()
    result = fastsal.prune(model, batches, 0.7, damping="0.1x", micro_batch=4, **arguments)
    masks = None
    rounds = arguments.get("rounds", 1)
    for r in range(1, rounds + 1):
        fisher = fastsal.collect(other, batches, micro_batch=4)
        damping = by_hand(fisher, 0.1)
        assert result.history[r - 1].damping == pytest.approx(damping, rel=1e-12)
        scores = fastsal.score(other, fisher, "obs-greedy", damping, masks=masks)
        new = fastsal.rank(scores, 0.7 if r == rounds else 1 - 0.3 ** (r / rounds))
        fastsal.compensate(other, fisher, new, damping, before=masks)
        masks = new
    assert result.masks == masks
    assert [e.damping_evidence for e in result.history] == [[]] * rounds
    assert result.masks.recipe["damping"] == [e.damping for e in result.history]


def test_prune_equals_that_of_the_absolute_number(batches, fisher):
    models = [net(), net()]
    for model, damping in zip(models, ["0.1x", by_hand(fisher, 0.1)], strict=True):
        result = fastsal.prune(model, batches, 0.7, damping=damping)
        assert result.history[0].damping == by_hand(fisher, 0.1)
    assert_equal(models[0].state_dict(), models[1].state_dict())


def test_a_multiple_does_not_depend_on_the_scale_of_the_loss(batches):
    """Four times the loss: sixteen times the curvature and `λ`, and the same masks and weights."""
    results = []
    for scale in (1.0, 4.0):
        model = net()

        def loss(out, labels, scale=scale):
            return scale * torch.nn.functional.cross_entropy(out, labels, reduction="none")

        result = fastsal.prune(model, batches, 0.7, damping="0.1x", loss=loss)
        results.append((result, model.state_dict()))
    (one, weights), (four, others) = results
    assert four.history[0].damping == 16 * one.history[0].damping
    assert four.masks == one.masks
    assert_equal(others, weights)


def test_statistics_of_zeros_have_a_damping():
    fisher = fastsal.BlockFisher({"w": (4,)})
    fisher.update({"w": torch.zeros(3, 4)})
    assert Multiple(0.1).of(mean_diagonal(fisher)) > 0
    assert min(candidates(mean_diagonal(fisher))) > 0


def test_a_limit_takes_a_multiple(batches):
    result = fastsal.prune(
        net(), batches, damping="0.1x", max_loss_increase=1.0, confidence=0.6, held_out=batches
    )
    assert result.history[0].damping == by_hand(fastsal.collect(net(), batches), 0.1)


def test_plan_memory_counts_the_pass_for_the_mean_diagonal(batches, monkeypatch):
    monkeypatch.setattr("fastsal.pruning.forecast._statistics_seconds", lambda *_: 10_000.0)
    how = {"samples": 48, "micro_batch": 4, "memory_budget": "102MiB", "rounds": 2}

    def uses(damping):
        plan = fastsal.plan_memory(net(), batches, damping=damping, **how)
        assert plan.place == "recomputed"
        return round(plan.seconds["statistics"] / 10_000)

    assert uses(1e-3) == 4
    assert uses("0.1x") == 4 + 2


def test_no_statistics_need_no_damping():
    model = net()
    masks = copy.deepcopy(fastsal.rank(fastsal.score(model, None, "magnitude", math.nan), 0.5))
    result = fastsal.prune(
        model, None, 0.5, criterion="magnitude", compensate=False, damping="0.1x"
    )
    assert result.masks == masks
    assert result.history[0].damping is None
