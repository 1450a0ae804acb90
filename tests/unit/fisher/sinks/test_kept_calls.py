"""Inputs and output gradients that are kept in place of rows: the same sums, in less memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal.fisher.block_fisher import sums_of
from fastsal.fisher.sinks import gathering
from fastsal.fisher.sinks.gathering import RowGatherer


class Net(nn.Module):
    """Layers of few positions and many weights, of both kinds, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 32, 3, stride=4, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.twice = nn.Conv2d(32, 32, 1)
        self.tokens = nn.Linear(32, 64, bias=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.grouped(torch.relu(self.narrow(x))))
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.tokens(x.flatten(2).transpose(1, 2))
        return self.head(torch.tanh(x).mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def images(n):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 5


def batches(sizes):
    x, y = images(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.fixture
def kept(monkeypatch):
    """Names of the parameters of which calls were kept, in order."""
    names = []
    defer = RowGatherer.defer

    def spy(self, name, shape, fill):
        names.append(name)
        defer(self, name, shape, fill)

    monkeypatch.setattr(RowGatherer, "defer", spy)
    return names


def assert_same(a, b):
    assert a.samples == b.samples
    for name in a.names:
        assert torch.equal(a.blocks(name), b.blocks(name)), name
    for name, mean in a.mean_gradient().items():
        assert torch.equal(mean, b.mean_gradient()[name]), name


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("sizes", [(40,), (7, 21, 1, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"samples": 37}, {"curvature": "features"}], ids=str)
def test_sums_are_those_of_gathered_rows(model, kept, monkeypatch, options, sizes, micro_batch):
    options = options | {"micro_batch": micro_batch}
    found = fastsal.collect(model, batches(sizes), **options)
    # The largest layer lends its buffer, and features do not depend on the head.
    names = {"narrow.weight", "tokens.weight"}
    if "curvature" not in options:
        names.add("head.weight")
    assert set(kept) == names
    monkeypatch.setattr(gathering, "_SMALL_CALL", -1.0)
    assert_same(found, fastsal.collect(model, batches(sizes), **options))


class Wide(nn.Module):
    """Rows of `last` are computed late, with larger scratch memory than those of `first` need."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.last = nn.Conv2d(64, 64, 3, stride=4, padding=1)
        self.most = nn.Linear(256, 200)
        self.head = nn.Linear(200, 5)

    def forward(self, x):
        x = torch.relu(self.last(torch.relu(self.first(x)))).flatten(1)
        return self.head(torch.tanh(self.most(x)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_rows_are_computed_late_in_any_mode(kept, mode):
    torch.manual_seed(0)
    wide = Wide().eval()
    some = batches((40, 40))
    want = fastsal.collect(wide, some, micro_batch=4, samples=80)
    assert "last.weight" in kept
    with mode():
        assert_same(fastsal.collect(wide, some, micro_batch=4, samples=80), want)


def test_a_loader_may_reuse_its_memory(kept):
    # The first layer has the images themselves as its input.
    flat = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 400),
        nn.ReLU(),
        nn.Linear(400, 300),
        nn.ReLU(),
        nn.Linear(300, 5),
    ).eval()
    x, y = images(24)
    want = fastsal.collect(flat, [(x, y)], micro_batch=4)
    memory = np.empty((4, 3, 8, 8), np.float32)

    def reused():
        for start in range(0, 24, 4):
            memory[:] = x[start : start + 4].numpy()
            yield torch.from_numpy(memory), y[start : start + 4]
            memory[:] = np.nan

    assert_same(fastsal.collect(flat, reused(), micro_batch=4, samples=24), want)
    assert "1.weight" in kept


def test_calls_are_kept_where_they_are_small():
    fisher = fastsal.BlockFisher({"most": (64, 32), "some": (32, 32)}, block_size=8)
    dtypes = {"most": torch.float32, "some": torch.float32}
    sink = RowGatherer(sums_of(fisher), dtypes, 8)
    row = 4 * 32 * 32
    assert sink.defers("some", (4, 32, 32), 4 * row // 2)
    assert not sink.defers("some", (4, 32, 32), 4 * row // 2 + 1)
    # Its buffer serves the others.
    assert not sink.defers("most", (4, 64, 32), 1)
    # A whole step is added at once.
    assert not sink.defers("some", (8, 32, 32), 1)
    dtypes["some"] = torch.float64
    assert not RowGatherer(sums_of(fisher), dtypes, 8).defers("some", (4, 32, 32), 1)
