"""A model on another device for a while, and `device` of the calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument
from fastsal.models import placing
from fastsal.models.loading import load_model
from fastsal.models.placing import autocasting, on_device


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model.append(model[3])  # not called: a module twice
    model[0].weight.grad = torch.ones(4, 3, 1, 1)
    return model


@pytest.fixture
def elsewhere(monkeypatch):
    """Another device, which this machine has in any case."""
    monkeypatch.setattr(placing, "resolve_device", torch.device)
    return "meta"


def test_none_leaves_a_model_where_it_is(model):
    model.to("meta")
    with on_device(model, None):
        assert model[0].weight.device.type == "meta"


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_has_its_own_tensors_again(model, elsewhere, fails):
    parameters, buffers = list(model.parameters()), list(model.buffers())
    tensors = {name: value.data_ptr() for name, value in model.state_dict().items()}
    gradient = model[0].weight.grad
    try:
        with on_device(model, elsewhere):
            assert {t.device.type for t in model.state_dict().values()} == {"meta"}
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert [a is b for a, b in zip(model.parameters(), parameters)] == [True] * len(parameters)
    assert [a is b for a, b in zip(model.buffers(), buffers)] == [True] * len(buffers)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == tensors
    assert model[0].weight.grad is gradient
    assert model[3] is model[4]


@pytest.mark.parametrize("keeps", [False, True])
def test_changes_are_kept_if_they_should_be(model, elsewhere, monkeypatch, keeps):
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def to(self, device):  # a device with values, unlike meta
        for p in self.parameters():
            p.data = p.data.clone()
        for module in self.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.clone())

    monkeypatch.setattr(nn.Module, "to", to)
    with on_device(model, elsewhere, keeps=keeps), torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value += 1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] + keeps)


def test_a_device_that_does_not_exist(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "device must be one of this machine, got 'cuda:1'; it has cpu"
    images = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
    masks = fastsal.Masks({"3.weight": torch.ones(3, 16)})
    task = fastsal.Task("a", images, images)
    for call in (
        lambda: load_model("resnet18", device="cuda:1"),
        lambda: fastsal.finetune(model, images, masks, epochs=1, lr=0.1, device="cuda:1"),
        lambda: fastsal.fit_heads(model, task, device="cuda:1"),
        lambda: fastsal.evaluate(model, task, {}, device="cuda:1"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            call()


def test_load_model_moves_a_model(monkeypatch, tiny_file):
    spec = f"{tiny_file}:tiny"
    assert load_model(spec, device="cpu").fc.weight.device.type == "cpu"
    assert load_model(spec, device=torch.device("cpu")).fc.weight.device.type == "cpu"
    monkeypatch.setattr("fastsal.models.loading.resolve_device", lambda name: torch.device("meta"))
    assert load_model(spec, device="cuda").fc.weight.device.type == "meta"


def test_autocasting():
    with autocasting(torch.device("cpu"), torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        with autocasting(torch.device("cpu"), None):
            assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
