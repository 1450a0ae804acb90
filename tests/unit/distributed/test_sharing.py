"""Held-out images that ranks measure in turn: the results of one process, on every rank."""

from __future__ import annotations

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastsal.data.held_out import Repeated
from fastsal.distributed.sharing import SharedExamination, SharedMeasure
from fastsal.gradients.losses import cross_entropy
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.measured import HeldOut

pytestmark = pytest.mark.usefixtures("one_thread")


class Threads:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank, size, said, barrier):
        self.rank, self.size = rank, size
        self._said, self._barrier = said, barrier

    def all_gather(self, value):
        self._said[self.rank] = value
        self._barrier.wait()
        found = list(self._said)
        self._barrier.wait()
        return found

    def dealt(self, items):
        return itertools.islice(items, self.rank, None, self.size)


def on_ranks(size, work):
    """Run `work(ranks)` on every rank; returns what each returned."""
    said, barrier = [None] * size, threading.Barrier(size, timeout=30)
    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(work, Threads(r, size, said, barrier)) for r in range(size)]
        return [job.result() for job in running]


def models():
    torch.manual_seed(0)
    dense = nn.Linear(6, 4).eval()
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned.weight[:, ::2] = 0
    return dense, pruned


def batches(n):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    y = torch.randint(0, 4, (n,), generator=generator)
    return Repeated(lambda: zip(x.split(10), y.split(10), strict=True))


@pytest.mark.parametrize("n", [95, 10])  # ten micro-batches, or one: some ranks have none
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "limit", [Limit("accuracy", 0.1), Limit("loss", 0.1, 0.9, 1.4)], ids=lambda x: x.kind
)
def test_a_limit_is_tested_as_by_one_process(n, size, limit):
    dense, pruned = models()
    alone = Examination(dense, batches(n), limit, cross_entropy, seed=5)

    def work(ranks):
        mine, other = copy.deepcopy(dense), copy.deepcopy(pruned)
        shared = SharedExamination(mine, batches(n), limit, cross_entropy, seed=5, ranks=ranks)
        return shared(other), shared.images, shared.seed

    for found in on_ranks(size, work):
        assert found == (alone(pruned), alone.images, alone.seed)
    assert alone.images == n


@pytest.mark.parametrize("size", [2, 3])
def test_a_loss_is_measured_as_by_one_process(size):
    dense, pruned = models()
    alone = HeldOut.of(dense, batches(95), cross_entropy)
    assert alone.samples == 95

    def work(ranks):
        own = Repeated(lambda: ranks.dealt(batches(95)))
        measure = SharedMeasure(HeldOut.of(copy.deepcopy(dense), own, cross_entropy), ranks)
        return measure.mean_loss(copy.deepcopy(pruned))

    assert on_ranks(size, work) == [alone.mean_loss(pruned)] * size
