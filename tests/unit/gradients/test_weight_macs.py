"""Multiply-accumulates of weights, against counting the products of each call by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal
from fastsal.deploy.sizes import model_size


class Mixed(nn.Module):
    """Layers that are called as modules, as functions, twice, and through a parametrization."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.thin = torch.nn.utils.parametrizations.weight_norm(nn.Linear(1, 2))
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.twice = nn.Linear(16, 16)
        self.free = nn.Parameter(torch.randn(5, 16))
        self.words = nn.Embedding(10, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        x = self.depthwise(self.down(x))  # 4 × 4
        x = self.thin(x.unsqueeze(4)).mean(4)
        x = self.normed(self.up(input=x).flatten(2).transpose(1, 2))  # 64 tokens
        x = x + self.words(torch.arange(x.shape[1]) % 10)
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.twice(self.norm(self.twice(x)))
        return F.linear(x.mean(1), self.free)


EXPECTED = {
    "free": 1,
    "down.weight": 16,
    "depthwise.weight": 16,
    "up.weight": 16,  # each input position; the outputs are four times as many
    "thin.parametrizations.weight.original0": 0,
    "thin.parametrizations.weight.original1": 128,
    "normed.parametrizations.weight.original0": 0,
    "normed.parametrizations.weight.original1": 64,
    "attention.in_proj_weight": 64,
    "attention.out_proj.weight": 64,
    "twice.weight": 128,
    "words.weight": 0,
}


@pytest.mark.parametrize("images", [1, 5])
def test_every_way_of_calling_a_layer(images):
    model = Mixed().train()
    model.down.weight.requires_grad_(False)
    x = torch.randn(images, 3, 8, 8)
    assert fastsal.weight_macs(model, x) == EXPECTED
    assert model.training
    assert not model.down.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        assert fastsal.weight_macs(model, x) == EXPECTED


def test_size_of_a_model_is_their_sum():
    model = Mixed().eval()
    own = dict(model.named_parameters())
    size = model_size(model, torch.randn(2, 3, 8, 8), has_values=True)
    assert size.macs == sum(each * own[name].numel() for name, each in EXPECTED.items())
    with torch.no_grad():
        own["attention.in_proj_weight"][:24] = 0
    less = model_size(model, torch.randn(2, 3, 8, 8), has_values=True)
    assert size.macs - less.nonzero_macs == 64 * 24 * 16


class Keeping(nn.Module):
    """Keeps a value of its weights in evaluation mode, as the attention of timm's LeViT does."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 2)
        self.bias_cache = {}

    def forward(self, x):
        if "sum" not in self.bias_cache:
            self.bias_cache["sum"] = self.table.sum()
        return self.fc(x) + self.bias_cache["sum"]


def test_nothing_of_the_pass_is_kept():
    model, x = Keeping().eval(), torch.randn(3, 4)
    model(x)
    assert fastsal.weight_macs(model, x) == {"table": 0, "fc.weight": 1}
    copy.deepcopy(model)  # fails for tensors with a graph
    assert model.bias_cache == {}


def test_images_are_made_up():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18")
    found = fastsal.weight_macs(model)
    own = dict(model.named_parameters())
    assert sum(each * own[name].numel() for name, each in found.items()) == 1_814_073_344
    assert found["conv1.weight"] == 112**2
    assert found["fc.weight"] == 1
