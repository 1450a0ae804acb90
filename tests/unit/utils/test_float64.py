"""Float64 where a device has none: on the CPU, and never on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsal
from fastsal.pruning.measured import HeldOut
from fastsal.transfer.evaluation import measure
from fastsal.utils import float64
from fastsal.utils.float64 import float64_device, in_float64

PACKAGE = Path(fastsal.__file__).parent


def test_a_device_that_has_float64_keeps_its_tensors():
    found = in_float64(torch.ones(2, device="meta"))
    assert (found.device.type, found.dtype) == ("meta", torch.float64)
    assert in_float64(torch.tensor([0.1])).tolist() == [float(torch.tensor(0.1))]


def test_a_device_without_float64_gives_them_to_the_cpu(monkeypatch):
    monkeypatch.setattr(float64, "WITHOUT_FLOAT64", {"mps", "meta"})
    assert float64_device("meta") == torch.device("cpu")
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, to: moved.append(to) or tensor)
    in_float64(torch.ones(2, device="meta"))
    assert moved == [torch.device("cpu"), torch.float64]


class NoFloat64(TorchDispatchMode):
    """Stands for a device without float64: no operation may make such a tensor of another type."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            assert found.dtype != torch.float64, func
        return found


def test_only_one_place_converts_tensors_that_may_be_on_a_device():
    """What runs on features and counts that were moved to the CPU before is listed here."""
    on_the_cpu = {"ridge.py", "logistic.py", "scoring.py", "cases.py", "study.py", "float64.py"}
    found = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if ".double()" in path.read_text("utf-8") or '"cpu", torch.float64' in path.read_text()
    }
    assert found <= on_the_cpu


@pytest.mark.parametrize("call", ["losses", "measure"])
def test_measurements_make_float64_in_that_place_alone(monkeypatch, call):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    batches = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
    monkeypatch.setattr(float64, "in_float64", lambda tensor: tensor)
    for module in ("fastsal.pruning.measured", "fastsal.transfer.evaluation"):
        monkeypatch.setattr(f"{module}.in_float64", lambda tensor: tensor)
    with NoFloat64():
        if call == "losses":
            HeldOut.of(model, batches, torch.nn.CrossEntropyLoss(reduction="none")).losses(model)
        else:
            measure(model, batches)
