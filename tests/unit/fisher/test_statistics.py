"""Statistics that are stored and those that are recomputed: the same groups, one interface."""

from __future__ import annotations

import pytest
import torch

import fastsal
from fastsal import BlockFisher
from fastsal.fisher.block_fisher import fisher_of, sums_of
from fastsal.fisher.collection.groups import add_samples, collected
from fastsal.fisher.collection.prepare import prepare
from fastsal.fisher.collection.recollected import Recollected
from fastsal.fisher.memory_plan import Use
from fastsal.fisher.statistics import Collected, squared_gradients, statistics_of

from ..small_net import net


def images(count=48, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(count // 8)]


def recomputed(model, batches, **more):
    how = {"memory_budget": "92MiB", "micro_batch": 4, "use": Use(again=True)}
    return collected(model, batches, **how | more)


def joined(statistics):
    """Diagonals of all groups, by parameter, flat."""
    found = {}
    for fisher, parts in statistics.groups():
        for key, values in fisher.diagonal().items():
            found.setdefault(parts[key].name, []).append(values.flatten())
    return {name: torch.cat(values) for name, values in found.items()}


def test_recomputed_groups_equal_stored_sums():
    model = net()
    stored = Collected(fastsal.collect(model, images(), micro_batch=4))
    again = recomputed(model, images())
    assert isinstance(again, Recollected)
    assert again.plan.place == "recomputed"
    assert again.plan.passes > 1
    assert (again.samples, again.shapes) == (stored.samples, stored.shapes)
    for _ in range(2):
        found = joined(again)
        for name, values in stored.fisher.diagonal().items():
            assert torch.equal(found[name], values.flatten())
    assert squared_gradients(again) == pytest.approx(squared_gradients(stored), rel=1e-12)


@pytest.mark.parametrize("way", ["merge", "add_samples"])
def test_more_samples_of_recomputed_statistics(way):
    model = net()
    again = recomputed(model, images(), use=Use(again=True, joins=True))
    more = images(16, seed=2)
    if way == "merge":
        again.merge(recomputed(model, more, use=Use(again=True, joins=True)))
    else:
        add_samples(again, model, more, micro_batch=4)
    stored = fastsal.collect(model, images(), micro_batch=4)
    stored.merge(fastsal.collect(model, more, micro_batch=4))
    assert again.samples == stored.samples == 64
    found = joined(again)
    for name, values in stored.diagonal().items():
        assert torch.equal(found[name], values.flatten())


def test_statistics_have_no_methods_that_they_cannot_honor():
    again = recomputed(net(), images())
    assert not isinstance(again, BlockFisher)
    for name in ("blocks", "diagonal", "mean_gradient", "inverse_diagonals", "save", "update"):
        assert not hasattr(again, name)


@pytest.mark.parametrize("samples", [3, 80])
def test_groups_share_the_memory_of_stored_sums(samples):
    fisher = BlockFisher({"a": (40, 30), "b": (7,)}, block_size=16)
    fisher.update({"a": torch.randn(samples, 40, 30), "b": torch.randn(samples, 7)})
    statistics = statistics_of(fisher)
    assert statistics_of(statistics) is statistics
    statistics.sums.storage.view_bytes = 2**12
    groups = list(statistics.groups())
    assert len(groups) > 1
    assert sum(len(part) for _, parts in groups for part in parts.values()) == 1207
    for some, parts in groups:
        for key, part in parts.items():
            own = sums_of(some).parameters[key].packed
            if own is not None:
                assert own.base is not None or own is sums_of(fisher).parameters[part.name].packed
    assert torch.equal(joined(statistics)["a"], fisher.diagonal()["a"].flatten())


def test_a_fisher_and_its_sums():
    fisher = BlockFisher({"a": (4,)})
    assert sums_of(fisher_of(sums_of(fisher))) is sums_of(fisher)


def test_a_budget_leaves_the_view_size_with_the_sums(tmp_path):
    how = {"memory_budget": "92MiB", "scratch": tmp_path, "micro_batch": 4}
    plan = prepare(net(), images(), **how).plan
    fisher = fastsal.collect(net(), images(), **how)
    assert sums_of(fisher).storage.view_bytes == plan.view < 2**28
    assert sums_of(fisher).storage.scratch is not None
