"""Numbers of NumPy and PyTorch, and representations that fit on a screen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastsal
from fastsal import BlockFisher
from fastsal.errors import InvalidArgument
from fastsal.fisher.collection.prepare import prepare
from fastsal.fisher.collection.recollected import Recollected
from fastsal.fisher.model_sums import ModelSums
from fastsal.utils.numbers import as_integer, as_real
from fastsal.utils.sizes import parse_bytes

from ..small_net import net

INTEGERS = [8, np.int64(8), np.uint8(8), np.array(8), torch.tensor(8), torch.tensor(8).int()]
REALS = [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)]
BOOLEANS = [True, np.True_, torch.tensor(True), np.array(True)]


def filled():
    fisher = BlockFisher({"w": (20,)}, block_size=8)
    fisher.update({"w": torch.randn(30, 20, generator=torch.Generator().manual_seed(0))})
    return fisher


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers(value):
    assert type(as_integer(value)) is int
    assert as_integer(value) == as_real(value) == 8
    fisher = BlockFisher({"w": (20,)}, block_size=value)
    assert type(fisher.block_size) is int
    batches = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)) for _ in range(3)]
    work = prepare(net(), batches, block_size=value, samples=value, micro_batch=value)
    assert (work.sums.block_size, work.how.samples, work.how.micro_batch) == (8, 8, 8)
    assert fastsal.collect(net(), batches, samples=value).samples == 8
    assert parse_bytes(value) == 8


@pytest.mark.parametrize("value", REALS, ids=repr)
def test_reals(value, tmp_path):
    assert as_real(value) == 0.5
    merged = filled()
    merged.merge(filled(), weight=value)
    assert merged.samples == 45
    decayed = filled()
    decayed.decay(value)
    assert decayed.samples == 15
    inverses = [filled().inverse_diagonals(damping)["w"].values for damping in (value, 0.5)]
    assert (inverses[0] == inverses[1]).all()
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.linspace(-1, 1, 20))
    scores = [fastsal.score(model, filled(), "obs-greedy", damping=d)["w"] for d in (value, 0.5)]
    assert torch.equal(*scores)
    fastsal.compensate(model, filled(), {"w": scores[0] > 0.1}, damping=value)
    assert fastsal.rank_pattern(model, filled(), "2:4", damping=value).sparsity == 0.5
    filled().save(tmp_path / "f")
    fastsal.merge_files([tmp_path / "f"] * 2, tmp_path / "sum", weights=[value, 1])
    assert BlockFisher.load(tmp_path / "sum").samples == 45


@pytest.mark.parametrize("value", BOOLEANS, ids=repr)
def test_booleans_are_no_numbers(value, tmp_path):
    filled().save(tmp_path / "f")
    fisher = filled()
    for argument, call in {
        "block_size": lambda: BlockFisher({"w": (20,)}, block_size=value),
        "weight": lambda: fisher.merge(filled(), weight=value),
        "factor": lambda: fisher.decay(value),
        "damping": lambda: fisher.inverse_diagonals(value),
        "samples": lambda: fastsal.collect(net(), [], samples=value),
        "micro_batch": lambda: fastsal.collect(net(), [], micro_batch=value),
        "memory_budget": lambda: parse_bytes(value),
    }.items():
        with pytest.raises(InvalidArgument, match=f"^{argument}"):
            call()
    assert fisher.samples == 30


@pytest.mark.parametrize(
    "value", [2.5, np.float64(8), torch.tensor(8.0), torch.ones(2), "8", np.arange(3)], ids=repr
)
def test_what_is_no_integer(value):
    assert as_integer(value) is None
    with pytest.raises(InvalidArgument, match="^block_size must be an integer, got "):
        BlockFisher({"w": (20,)}, block_size=value)


@pytest.mark.parametrize(
    "value", ["1", None, 1j, torch.ones(2), torch.tensor(1j), np.inf, torch.tensor(torch.nan)]
)
def test_what_is_no_finite_real(value):
    assert as_real(value) is None


# One screen is 24 lines of 80 characters; these are far below it.


def test_representation_of_a_fisher():
    fisher = BlockFisher({f"layer{i}.weight": (8, 8) for i in range(1000)}, block_size=8)
    assert repr(fisher) == (
        "BlockFisher(1000 parameters, 64,000 weights, block_size=8, samples=0, float32)"
    )


@pytest.mark.parametrize("budget", [None, "92MiB"])
def test_representation_of_a_plan(tmp_path, budget):
    batches = [(torch.randn(48, 3, 8, 8), torch.zeros(48, dtype=torch.long))]
    more = {} if budget is None else {"memory_budget": budget, "scratch": tmp_path}
    work = prepare(net(), batches, micro_batch=4, is_dry=True, **more)
    shown = repr(work.plan)
    assert shown.startswith(f"MemoryPlan(budget={'None' if budget is None else '92 MiB'}, memory=")
    assert f"passes={work.plan.passes}, micro_batch=4" in shown
    assert "Part(" not in shown
    assert len(shown) < 240


def test_representation_of_internal_statistics():
    sums = ModelSums.empty({f"w{i}": (64,) for i in range(100)}, 64, "float32")
    assert repr(sums).startswith("ModelSums(100 parameters, 6,400 weights")
    assert "Recollected(" in repr(recollected_of(sums))


def recollected_of(sums):
    from fastsal.fisher.collection.work import Passes, Work

    work = Work(None, None, sums, lambda: iter([(torch.zeros(5, 1), None)]))
    return Recollected(work, Passes([{}], lambda *_: None))
