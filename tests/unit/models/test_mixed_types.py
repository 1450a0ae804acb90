"""Models whose first parameter has another type than the layers that images enter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsal
from fastsal.deploy.timing import torch_run
from fastsal.pruning.recalibration import recalibrate


class Mixed(nn.Module):
    """A scale in float32 before layers in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.conv = nn.Conv2d(3, 8, 3, padding=1).double()
        self.norm = nn.BatchNorm2d(8).double()
        self.wide = nn.Linear(8, 16).double()
        self.fc = nn.Linear(16, 6).double()
        self.head = nn.Linear(6, 4).double()

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale
        return self.head(self.fc(self.wide(x).relu()))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(4)]


def test_units_are_removed(model, batches):
    before = copy.deepcopy(model)
    fastsal.prune_structure(model, batches, 0.5, structure="mlp")
    assert model.wide.out_features == 8
    assert model.wide.weight.dtype == torch.float64
    assert not torch.equal(before.fc.bias, model.fc.bias)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, batches: fastsal.prune(model, batches, 0.5, damping=1e-3),
        lambda model, batches: recalibrate(model, batches),
        lambda model, batches: torch_run(model, batches[0][0])(),
        lambda model, batches: fastsal.finetune(
            model,
            batches,
            fastsal.Masks({"fc.weight": torch.ones(6, 16).bool()}),
            epochs=1,
            lr=1e-3,
        ),
    ],
)
def test_images_have_the_type_of_the_layers(model, batches, call):
    call(model, batches)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
