"""`Masks.hold` with optimizers that wrap another one, as libraries for training return them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from fastsal import Masks
from fastsal.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("one_thread")


class Accelerated(Optimizer):
    """Of the shape of `accelerate.optimizer.AcceleratedOptimizer`: an Optimizer without hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none=None):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)


class Fabric:
    """Of the shape of `_FabricOptimizer`: it claims the class of the optimizer inside."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Fabric" + type(optimizer).__name__, (Fabric, type(optimizer)), {})

    optimizer = property(lambda self: self._optimizer)

    def step(self, closure=None):
        return self.optimizer.step()

    def zero_grad(self):
        self._optimizer.zero_grad()

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Sharpness(Optimizer):
    """Of the shape of sharpness-aware minimization: an Optimizer with its own steps and state."""

    def __init__(self, optimizer):
        super().__init__([p for g in optimizer.param_groups for p in g["params"]], {})
        self.base_optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moved"] = torch.full_like(p, 0.1)
                p.data.add_(self.state[p]["moved"])
        self.base_optimizer.step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(self.state[p]["moved"])


class Shell:
    """A wrapper that is no Optimizer at all."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()


WRAPPERS = {
    "accelerate": Accelerated,
    "Fabric": Fabric,
    "sharpness": Sharpness,
    "shell": Shell,
    "two": lambda inner: Accelerated(Sharpness(inner)),
    "three": lambda inner: Shell(Fabric(Accelerated(inner))),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def masks():
    return Masks({"0.weight": torch.arange(48).reshape(8, 6) % 2})


def train(model, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 6, generator=generator)).square().sum().backward()
        optimizer.step()


def hooks_of(optimizer):
    return {k: copy.copy(v) for k, v in vars(optimizer).items() if "hook" in k}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("several", [False, True])
def test_zeros_are_held_with_a_wrapped_optimizer(wrap, several):
    model, held = net(), masks()
    inner = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = wrap(inner)
    before = hooks_of(inner)
    train(model, optimizer)  # moments of the dense weights
    pruned = ~held["0.weight"]
    with held.hold(model, [optimizer] if several else optimizer):
        for _ in range(2):
            train(model, optimizer)
            held.verify(model)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not inner.state[model[0].weight][moment][pruned].any()
    held.verify(model)
    assert hooks_of(inner) == before


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_training_is_that_of_the_optimizer_inside(wrap):
    if wrap in (Sharpness, WRAPPERS["two"]):
        pytest.skip("it trains in another way")
    models = net(), net()
    for model, make in zip(models, (lambda inner: inner, wrap)):
        optimizer = make(torch.optim.Adam(model.parameters(), lr=0.01))
        with masks().hold(model, optimizer):
            train(model, optimizer)
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_optimizer_of_another_model_is_refused(wrap):
    optimizer = wrap(torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(InvalidArgument, match="optimizer must hold the masked parameters"):
        masks().hold(net(), optimizer).__enter__()


def test_the_real_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, held = net(), masks()
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, inner)
    with held.hold(model, optimizer):
        train(model, optimizer)
    held.verify(model)


def test_the_real_fabric():
    fabric = pytest.importorskip("lightning_fabric")
    model, held = net(), masks()
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer = fabric.Fabric(accelerator="cpu", devices=1).setup(model, inner)
    with held.hold(model, optimizer):
        train(model, optimizer)
    held.verify(model)
