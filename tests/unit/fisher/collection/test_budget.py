"""Statistics and pruning within a memory budget: the same results, by other ways."""

from __future__ import annotations

import copy
import os

import pytest
import torch

import fastsal
from fastsal.errors import DataError, InvalidArgument
from fastsal.fisher.collection.prepare import prepare
from fastsal.utils.sizes import parse_bytes

from ...small_net import net


def images(count=48):
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(count // 8)]


# All of them go over the images more than once; the last one cuts a parameter.
BUDGETS = ["100MiB", "92MiB", "89MiB"]


def assert_equal(a, b):
    assert a.samples == b.samples
    for name in a.names:
        assert torch.equal(a.blocks(name), b.blocks(name)), name
    for x, y in zip(a.mean_gradient().values(), b.mean_gradient().values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("samples", [None, 20, 48])
@pytest.mark.parametrize("budget", BUDGETS)
def test_sums_are_those_without_a_budget(tmp_path, budget, samples):
    model = net()
    how = {"micro_batch": 4, "samples": samples}
    plan = prepare(model, images(), memory_budget=budget, scratch=tmp_path, **how).plan
    assert plan.passes > 1
    assert plan.place == "file"
    assert plan.micro_batch == 4  # with smaller ones kernels, and the last bits, may be others
    assert plan.memory <= parse_bytes(budget)
    limited = fastsal.collect(model, images(), memory_budget=budget, scratch=tmp_path, **how)
    assert_equal(limited, fastsal.collect(model, images(), **how))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("curvature", ["sampled", "features"])
def test_what_is_drawn_is_the_same_in_every_pass(tmp_path, curvature):
    model, how = net(), {"micro_batch": 4, "curvature": curvature, "seed": 3}
    limited = fastsal.collect(model, images(), memory_budget="92MiB", scratch=tmp_path, **how)
    assert_equal(limited, fastsal.collect(model, images(), **how))


@pytest.mark.parametrize("criterion", ["obs-greedy", "block-fisher", "diag-fisher", "taylor"])
def test_scores_and_compensation_from_a_file(tmp_path, criterion):
    how = {"micro_batch": 4}
    models = net(), net()
    budget = {"memory_budget": "89MiB", "scratch": tmp_path}
    fishers = (
        fastsal.collect(models[0], images(), **how),
        fastsal.collect(models[1], images(), **how, **budget),
    )
    scores = [fastsal.score(m, f, criterion) for m, f in zip(models, fishers, strict=True)]
    for name in scores[0]:
        assert torch.equal(scores[0][name], scores[1][name])
    masks = fastsal.rank(scores[0], 0.6)
    reports = [fastsal.compensate(m, f, masks) for m, f in zip(models, fishers, strict=True)]
    assert reports[0].increase == pytest.approx(reports[1].increase, rel=1e-12)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


HOW = [
    {"damping": 1e-4},
    {"damping": "auto"},
    {"damping": "auto", "rounds": 3},
    # Reconstruction uses as many rows as fit into the budget.
    {"damping": "auto", "curvature": "features", "recalibrate": True, "reconstruct": False},
    {"pattern": "2:4", "damping": 1e-4},
    {"pattern": "1x4", "damping": 1e-4, "floor": 0.1},
    {"criterion": "block-fisher", "compensate": False, "damping": 1e-3},
    {"criterion": "magnitude", "damping": 1e-3},
    {"curvature": "sampled", "damping": 1e-3},
]


# In a file, or collected again for each use, which leaves copies of weights in memory.
@pytest.mark.parametrize("is_again", [False, True], ids=["file", "again"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_pruning_is_the_same(tmp_path, how, is_again):
    models = net(), net()
    sparsity = None if how.get("pattern") == "2:4" else 0.7
    common = {"sparsity": sparsity, "micro_batch": 4, **how}
    budget = {"memory_budget": "102MiB"} if is_again else {"memory_budget": "98MiB"}
    if not is_again:
        budget["scratch"] = tmp_path
    free = fastsal.prune(models[0], images(96), **common)
    within = fastsal.prune(models[1], images(96), **budget, **common)
    plan = within.history[0].memory_plan
    assert plan["place"] == ("recomputed" if is_again else "file")
    assert plan["passes"] > 1
    assert plan["memory"] <= parse_bytes(budget["memory_budget"])
    assert free.masks == within.masks
    told = [(r.history[0].damping, r.history[0].samples) for r in (free, within)]
    assert told[0] == told[1]
    for name in free.scores:
        assert torch.equal(free.scores[name], within.scores[name])
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damping", [1e-3, "auto"])
@pytest.mark.parametrize("is_again", [False, True], ids=["file", "again"])
def test_a_limit_within_a_budget(tmp_path, is_again, damping):
    models = net(), net()
    common = {"max_loss_increase": 1.0, "micro_batch": 4, "damping": damping, "confidence": 0.5}
    budget = {"memory_budget": "98MiB", "scratch": tmp_path}
    if is_again:
        budget = {"memory_budget": "102MiB"}
    free = fastsal.prune(models[0], images(96), **common)
    within = fastsal.prune(models[1], images(96), **budget, **common)
    assert within.history[0].memory_plan["place"] == ("recomputed" if is_again else "file")
    assert free.masks == within.masks
    assert free.safety.sparsity == within.safety.sparsity


def test_what_is_collected_again_is_told_of(tmp_path):
    """Progress of every use; a model that fails in the middle of one is as it was."""
    model, told = net(), []
    before = copy.deepcopy(model.state_dict())

    def report(done, total):
        told.append((done, total))
        if len(told) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastsal.prune(
            model,
            images(),
            0.5,
            damping=1e-3,
            memory_budget="92MiB",
            micro_batch=4,
            progress=report,
        )
    assert told[0][0] == 4
    assert told[0][1] % 48 == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_statistics_that_users_hold_are_not_collected_again():
    with pytest.raises(
        InvalidArgument, match="memory_budget of .* leaves .* for statistics of .*scratch="
    ):
        fastsal.collect(net(), images(), memory_budget="92MiB", micro_batch=4)


def test_a_budget_that_is_large_enough_changes_nothing():
    model = net()
    assert_equal(
        fastsal.collect(model, images(), memory_budget="4GiB"), fastsal.collect(model, images())
    )


def test_large_blocks_keep_gradients_in_the_file(tmp_path):
    model, how = net(), {"micro_batch": 4, "samples": 24, "block_size": 512}
    limited = fastsal.collect(model, images(), memory_budget="96MiB", scratch=tmp_path, **how)
    assert_equal(limited, fastsal.collect(model, images(), **how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"memory_budget": "10MiB"}, "memory_budget must be at least .*, got 10 MiB"),
        ({"memory_budget": -1}, "memory_budget must be .*bytes, .*got -1"),
        ({"memory_budget": "much"}, "memory_budget must be .*bytes, .*got 'much'"),
        ({"scratch": "."}, "scratch and scratch_budget must be None without memory_budget"),
        (
            {"memory_budget": "90MiB", "scratch": "nowhere"},
            "scratch must be an existing .*'nowhere'",
        ),
        (
            {"memory_budget": "90MiB", "scratch": ".", "scratch_budget": "1MB"},
            "scratch_budget must be at least .*, got 977 KiB",
        ),
    ],
)
@pytest.mark.parametrize("call", ["collect", "prune"])
def test_budgets_that_are_not_taken(call, how, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    more = {} if call == "collect" else {"sparsity": 0.5, "damping": 1e-3}
    with pytest.raises(InvalidArgument, match=message):
        getattr(fastsal, call)(model, images(), **how, **more)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_images_that_come_once(tmp_path):
    with pytest.raises(
        InvalidArgument,
        match="batches must be .*iterated several times, got an iterator; .* passes",
    ):
        fastsal.prune(net(), iter(images()), 0.5, damping=1e-3, memory_budget="92MiB")
    with pytest.raises(
        InvalidArgument,
        match="batches must be .*iterated several times, got an iterator; .* passes",
    ):
        fastsal.collect(net(), iter(images()), memory_budget="92MiB", scratch=tmp_path)
    assert fastsal.collect(net(), iter(images()), memory_budget="1GiB").samples == 48


def test_images_that_change(tmp_path):
    class Growing:
        def __init__(self):
            self.count = 48

        def __iter__(self):
            self.count += 8
            return iter(images(self.count))

    with pytest.raises(
        DataError, match="must yield the same images on every pass .*got .* samples, then"
    ):
        fastsal.collect(net(), Growing(), memory_budget="92MiB", scratch=tmp_path)
    with pytest.raises(
        DataError, match="must yield the same images on every pass .*got .* samples, then"
    ):
        fastsal.prune(net(), Growing(), 0.5, damping=1e-3, memory_budget="92MiB")


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 g", 3 << 29), (1000, 1000), ("2048", 2048)],
)
def test_bytes_of_text(text, value):
    assert parse_bytes(text) == value
