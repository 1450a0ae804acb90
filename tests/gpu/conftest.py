"""Devices that the tests of this folder run on: the CPU, and a GPU of CUDA if there is one.

With FASTSAL_TEST_DEVICE=pretended they run on that of `pretended.py` instead. Stated tolerances are
those of a GPU, whose sums have another order. TF32 is off, so that products are those of float32.
"""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

import fastsal.cli.types
from fastsal.data.image_set import ImageSet
from fastsal.utils import devices

from . import pretended

PRETENDED = os.environ.get("FASTSAL_TEST_DEVICE") == "pretended"
PLACES = [pretended.NAME] if PRETENDED else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def device(request, monkeypatch) -> torch.device:
    if request.param == pretended.NAME:
        found = pretended.register()
        monkeypatch.setattr(devices, "available_devices", lambda: ["cpu", str(found)])
        monkeypatch.setattr(torch.Tensor, "data_ptr", pretended.address)
        for module in (devices, fastsal.cli.types):
            monkeypatch.setattr(module, "is_device_name", lambda name: True)
        return found
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


class Net(nn.Module):
    """Convolutions with and without groups, batch normalization, attention, linear layers."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 24)
        self.fc = nn.Linear(24, num_classes)

    def forward_features(self, x):
        x = torch.relu(self.deep(torch.relu(self.norm(self.conv(x)))))
        x = x[:, :, ::2, ::2].flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return torch.tanh(self.hidden(x.mean(1)))

    def forward(self, x):
        return self.fc(self.forward_features(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.normal_(0, 0.1)
        model.norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def model() -> nn.Module:
    return net()


@pytest.fixture
def there(device) -> nn.Module:
    """The same model on the device."""
    return net().to(device)


@pytest.fixture
def images() -> ImageSet:
    """96 images of three classes that differ in color."""
    rng = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = rng.integers(0, 90, (96, 8, 8, 3))
    x[np.arange(96), :, :, y] += 120
    return ImageSet(x.astype(np.uint8), y.astype(np.int64), source="colors")


@pytest.fixture
def batches(images, model):
    """Pairs of images and labels, on the CPU."""
    from fastsal.models.inputs import input_spec

    return list(images.batches(input_spec(model), 16, shuffle_seed=0))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a model, on the CPU."""
    return {name: value.detach().cpu() for name, value in copy.copy(model.state_dict()).items()}


def assert_close(found, expected, rtol=1e-4, atol=1e-7) -> None:
    """Compare tensors, by name, up to a fraction of the largest value of each."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        largest = float(value.abs().max()) if value.is_floating_point() else 0.0
        most = max(atol, rtol * largest)
        torch.testing.assert_close(
            found[name].cpu(), value.cpu(), rtol=0, atol=most, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_masks(found, expected, most=0.01) -> None:
    """Compare masks; few weights near the threshold may differ."""
    assert set(found) == set(expected)
    differing = sum(int((found[name] != expected[name]).sum()) for name in expected)
    assert differing <= most * expected.total, (differing, expected.total)
