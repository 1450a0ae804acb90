"""Micro-batches of several ranks: those of one process, dealt out; their rows in the same steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastsal
from fastsal.distributed.exchange import StepSums, add_sharded_pass
from fastsal.distributed.sharing import in_order
from fastsal.fisher.block_fisher import sums_of
from fastsal.fisher.collection.passes import PassSettings, add_pass
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import by_key, uncut
from fastsal.fisher.shares import shares
from fastsal.fisher.sinks.gathering import RowGatherer

pytestmark = pytest.mark.usefixtures("one_thread")


class Alone:
    """One rank of several, that hears only itself."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def gather(self, rows, owner):
        return [rows] * self.size if owner == self.rank else None

    def all_gather(self, value):
        return [value] * self.size


def run_through(step, micro_batch, batches, add):
    """Numbers of the samples of each micro-batch, and the draws of a run, in order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)).eval()
    chosen = fastsal.select_parameters(model)
    how = PassSettings(
        model, chosen, "cross-entropy", "empirical", 0, None, None, micro_batch, step, None
    )
    seen = []
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0][:, 0].int().tolist()))
    start, pairs = 0, []
    for n in batches:
        x = torch.arange(start, start + n).float()[:, None].expand(n, 3)
        pairs.append((x, torch.zeros(n, dtype=torch.int64)))
        start += n
    add(how, {name: tuple(p.shape) for name, p in chosen.items()}, pairs)
    return seen[1:]  # the first are two samples that are looked at, not summed


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 12),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 6),
)
def test_micro_batches_are_dealt_out_whole(micro_batch, more, batches, size):
    step = micro_batch + more  # a budget's micro-batch need not divide a step

    def by_one(how, shapes, pairs):
        sums = ModelSums.empty(shapes, 64, "float32")
        add_pass(how, sums, by_key(uncut(shapes)), pairs, lambda *_: None)

    expected = run_through(step, micro_batch, batches, by_one)
    found = []
    for rank in range(size):

        def by_rank(how, shapes, pairs, rank=rank):
            owned = shares(uncut(shapes), 2, size)
            own = by_key(owned[rank])
            sums = ModelSums.empty({key: (len(p),) for key, p in own.items()}, 2, "float32")
            add_sharded_pass(how, sums, owned, Alone(rank, size), pairs, lambda *_: None)

        found.append(run_through(step, micro_batch, batches, by_rank))
    turns = -(-len(expected) // size)
    assert [len(seen) for seen in found] == [turns] * size
    # A rank without a micro-batch in the last turn runs the last one again.
    every = in_order(found)
    assert every[: len(expected)] == expected
    assert all(again == expected[-1] for again in every[len(expected) :])


@pytest.mark.parametrize("turn", [4, 12, 20])
@pytest.mark.parametrize("count", [31, 46])
def test_steps_of_ranks_are_those_of_one_process(turn, count):
    """Also where it is not known how many samples come, and gradients are kept while they are few.

    32 of them take no more memory than blocks of 64.
    """
    torch.manual_seed(0)
    rows = torch.randn(count, 200) * torch.logspace(-3, 3, count)[torch.randperm(count), None]
    one, ranks = (fastsal.BlockFisher({"w": (200,)}) for _ in range(2))
    gatherer = RowGatherer(sums_of(one), {"w": torch.float32}, 24)
    for some in rows.split(4):
        gatherer("w", some)
        gatherer.end_micro_batch(len(some))
    gatherer.flush()
    sums = StepSums(sums_of(ranks), 24, None)
    for some in rows.split(turn):
        sums.add("w", some)
        sums.end_micro_batch(len(some))
    sums.flush()
    assert torch.equal(ranks.blocks("w"), one.blocks("w"))
    assert torch.equal(ranks.mean_gradient()["w"], one.mean_gradient()["w"])
