"""A module that has two names in a model is left as it was: the same parameter objects."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal


class Shared(nn.Module):
    """One layer under two names, as the position encodings of CoaT, and a tied weight."""

    def __init__(self, *, is_slow: bool) -> None:
        super().__init__()
        layer = nn.Linear(6, 6)
        self.first = nn.ModuleDict({"layer": layer})
        self.second = nn.ModuleDict({"layer": layer})
        self.third = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.third.weight
        self.head = nn.Linear(6, 3)
        self.is_slow = is_slow

    def forward(self, x):
        layer = self.first["layer"]
        # A product with the weight has no rule.
        x = x @ layer.weight.mul(1.0).T + layer.bias if self.is_slow else layer(x)
        x = self.second["layer"](torch.tanh(x))
        return self.head(self.tied(torch.tanh(self.third(torch.tanh(x)))))


def places(model):
    """Every parameter object, by every name."""
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("is_slow", [False, True])
def test_parameters_are_the_same_objects(is_slow):
    torch.manual_seed(0)
    model = Shared(is_slow=is_slow).double()
    model.third.bias.requires_grad_(False)
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 3
    before = places(model)
    found = fastsal.per_sample_gradients(model, x, y)
    assert places(model) == before
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert all(p.requires_grad is (p is not model.third.bias) for p in model.parameters())
    assert set(found) == {"first.layer.weight", "third.weight", "head.weight"}
    for i in range(5):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        names = {name: model.get_parameter(name) for name in found}
        truth = torch.autograd.grad(loss, list(names.values()))
        for name, gradient in zip(names, truth, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-10, atol=1e-12)


def test_an_optimizer_still_moves_a_pruned_model():
    torch.manual_seed(0)
    model = Shared(is_slow=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(40, 6), torch.arange(40) % 3
    masks = fastsal.prune(model, [(x, y)], 0.5, damping=1e-2).masks
    masks.verify(model)
    pruned = model.first["layer"].weight.detach().clone()
    with masks.hold(model, optimizer):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not torch.equal(model.first["layer"].weight, pruned)
    masks.verify(model)
