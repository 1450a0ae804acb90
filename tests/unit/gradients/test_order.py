"""The order in which rows arrive, known ahead, and parameters that a pass does not use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsal.gradients import GradientEngine, select_parameters


class Net(nn.Module):
    """Layers that are defined in another order than they are used, one of them twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 3)
        self.twice = nn.Linear(6, 6)
        self.stem = nn.Linear(5, 6)
        self.other = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6, 6))  # no rule

    def forward(self, x):
        h = self.twice(self.stem(x).relu())
        if x[0, 0] < 0:
            h = self.other(h)
        return self.head(self.twice(h).tanh() @ self.scale.exp())


class Arrivals:
    """A sink that records what arrives."""

    def __init__(self):
        self.names, self.rows = [], {}

    def __call__(self, name, rows):
        self.names.append(name)
        self.rows[name] = rows.clone()


class Asking(Arrivals):
    """One that is told of what is not used, ahead of the backward pass."""

    def __init__(self):
        super().__init__()
        self.skipped = []

    def skip(self, name):
        assert not self.names
        self.skipped.append(name)


@pytest.fixture(params=["weights", "all"])
def engine(request):
    model = Net().eval()
    names = (
        None
        if request.param == "weights"
        else [n for n, p in model.named_parameters() if p.dim() > 1]
    )
    with GradientEngine(model, select_parameters(model, names)) as engine:
        yield engine


def batch(sign):
    torch.manual_seed(1)
    x = torch.randn(4, 5)
    x[0, 0] = sign
    return x, torch.tensor([0, 1, 2, 0])


def test_the_order_is_known_ahead(engine):
    engine.prepare(*batch(-1))
    sink = Arrivals()
    engine.run(*batch(-1), sink)
    assert sink.names == engine.order
    assert engine.order[:3] == ["head.weight", "other.weight", "twice.weight"]


def test_unused_parameters_are_told_ahead(engine):
    engine.prepare(*batch(-1))
    plain, asking = Arrivals(), Asking()
    engine.run(*batch(1), plain)
    engine.run(*batch(1), asking)
    assert asking.skipped == ["other.weight"]
    assert not plain.rows.pop("other.weight").any()
    assert plain.rows.keys() == asking.rows.keys()
    for name, rows in plain.rows.items():
        assert torch.equal(asking.rows[name], rows)
