"""What a model has is saved, and what cannot be saved is told beforehand."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from fastsal.errors import InvalidArgument
from fastsal.models.saving import check_savable
from fastsal.models.weights import load_weights, save_weights


class Extra(nn.Module):
    """A layer with state that is not a tensor, as those of quantization libraries have."""

    def __init__(self, state):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        return self.fc(x)


STATES = [
    {"scale": 0.5, "names": ["a", "b"]},
    {"amax": torch.arange(3.0)},
    torch.arange(4.0),
    b"bytes",
    None,
]


@pytest.mark.parametrize("state", STATES)
def test_extra_state_is_saved_and_loaded(state, tmp_path):
    model = nn.Sequential(Extra(state), nn.ReLU())
    check_savable(model)
    save_weights(model, tmp_path / "w.safetensors")
    again = nn.Sequential(Extra({"scale": 0.0} if not torch.is_tensor(state) else 0 * state))
    load_weights(again, tmp_path / "w.safetensors")
    assert torch.equal(again[0].fc.weight, model[0].fc.weight)
    assert str(again[0].state) == str(state)
    if not torch.is_tensor(state):
        assert set(load_file(tmp_path / "w.safetensors")) == {"0.fc.weight", "0.fc.bias"}


class Opaque:
    pass


def test_extra_state_that_needs_code_is_left_out(tmp_path):
    model = Extra(Opaque())
    with pytest.warns(UserWarning, match="the state '_extra_state' .* left out"):
        check_savable(model)
    save_weights(model, tmp_path / "w.safetensors")
    again = Extra("own")
    load_weights(again, tmp_path / "w.safetensors")
    assert again.state == "own"
    assert torch.equal(again.fc.weight, model.fc.weight)


def test_a_tensor_with_two_names_is_written_once(tmp_path):
    model = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
    model["a"].weight = model["b"].weight
    save_weights(model, tmp_path / "w.safetensors")
    assert set(load_file(tmp_path / "w.safetensors")) == {"a.weight", "a.bias", "b.bias"}
    for load in (load_weights, load_model):  # other tools know the names too
        again = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
        again["a"].weight = again["b"].weight
        load(again, tmp_path / "w.safetensors")
        assert torch.equal(again["b"].weight, model["b"].weight)


class Views(nn.Module):
    """Buffers that are parts of one tensor, which no buffer holds whole."""

    def __init__(self):
        super().__init__()
        base = torch.arange(10.0)
        self.register_buffer("first", base[:6])
        self.register_buffer("last", base[4:])
        self.register_buffer("steps", base[::3])
        self.register_buffer("none", base[:0])
        self.weight = nn.Parameter(torch.ones(3, 2).t())


def test_tensors_that_share_memory(tmp_path):
    model = Views()
    save_weights(model, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value)
    load_weights(Views(), tmp_path / "w.safetensors")


def reserved():
    model = nn.Linear(2, 2)
    model.register_buffer("__metadata__", torch.ones(2))
    return model


def sparse():
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.eye(2).to_sparse())
    return model


def meta():
    return nn.Linear(2, 2, device="meta")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (reserved, "model: the name '__metadata__' is reserved"),
        (sparse, "model: 'table' must be a dense tensor .* got one that is sparse"),
        (meta, "model: 'weight' must be a dense tensor .* without data"),
        (nn.ReLU, "model must have parameters or buffers to write"),
    ],
)
def test_what_a_file_cannot_have_is_told_beforehand(make, message, tmp_path):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        check_savable(make())
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        save_weights(make(), tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_are_those_of_the_tensors(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8).half())
    nbytes = check_savable(model)
    save_weights(model, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert nbytes == sum(t.numel() * t.element_size() for t in tensors)
