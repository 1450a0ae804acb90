"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from fastsal.errors import InvalidArgument
from fastsal.utils.devices import (
    available_devices,
    device_facts,
    is_device_name,
    resolve_device,
)


@pytest.fixture
def machine(monkeypatch):
    """Stands for a machine with GPUs of CUDA and perhaps that of Apple."""

    def make(gpus: int = 0, *, current: int = 0, mps: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


@pytest.mark.parametrize("name", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"])
def test_names(name):
    assert is_device_name(name)


@pytest.mark.parametrize(
    "name", ["", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:1 ", "cuda:١", "cpu:0", "meta", None, 0]
)
def test_other_values_are_no_names(name):
    assert not is_device_name(name)


@pytest.mark.parametrize(
    ("gpus", "mps", "found"), [(0, False, "cpu"), (2, False, "cuda:1"), (0, True, "mps")]
)
def test_auto(machine, gpus, mps, found):
    machine(gpus, current=1, mps=mps)
    assert resolve_device("auto") == torch.device(found)


def test_names_of_gpus(machine):
    machine(2, current=1)
    assert available_devices() == ["cpu", "cuda:0", "cuda:1"]
    assert resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    assert resolve_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "gpus", "has"),
    [
        ("cuda", 0, "cpu"),
        ("cuda:1", 0, "cpu"),
        ("mps", 0, "cpu"),
        ("cuda:2", 2, "cpu, cuda:0, cuda:1"),
    ],
)
def test_what_a_machine_lacks(machine, name, gpus, has):
    machine(gpus)
    with pytest.raises(InvalidArgument) as found:
        resolve_device(name)
    assert str(found.value) == f"device must be one of this machine, got '{name}'; it has {has}"


@pytest.mark.parametrize("name", ["gpu", "tpu", torch.device("meta"), 1])
def test_what_is_no_device(name):
    with pytest.raises(InvalidArgument, match="device must be auto, cpu, cuda, cuda:N or mps, got"):
        resolve_device(name)


def test_facts(monkeypatch):
    assert device_facts(torch.device("cpu")) == {"device": "cpu"}
    gpu = type("Properties", (), {"total_memory": 2**36})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert device_facts(torch.device("cuda", 1)) == {
        "device": "cuda:1",
        "gpu": "NVIDIA H200",
        "gpu_memory_bytes": 2**36,
    }
