"""Without labels, `prune` matches features; with labels it uses their loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import DataError


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture
def images():
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


def result(model, batches, **options):
    model = copy.deepcopy(model)
    fastsal.prune(model, batches, 0.5, damping=1e-3, **options)
    return list(model.state_dict().values())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("form", ["images", "pairs", "dicts", "iterator"])
def test_images_alone_are_matched_by_features(model, images, form):
    wanted = result(model, [(images, None)], curvature="features")
    batches = {
        "images": [images],
        "pairs": [(images, None)],
        "dicts": [{"pixel_values": images}],
        "iterator": iter([images]),
    }[form]
    assert same(result(model, batches), wanted)


@pytest.mark.parametrize("once", [False, True])
def test_labels_are_used(model, images, once):
    batches = [(images, torch.arange(64) % 4)]
    wanted = result(model, batches, curvature="empirical")
    assert same(result(model, iter(batches) if once else batches), wanted)
    assert not same(wanted, result(model, batches, curvature="features"))


@pytest.mark.parametrize(
    "options",
    [{"loss": lambda outputs, labels: outputs.sum(1)}, {"max_accuracy_drop": 0.1}],
    ids=["loss", "limit"],
)
def test_what_needs_labels_asks_for_them(model, images, options):
    sparsity = None if "max_accuracy_drop" in options else 0.5
    with pytest.raises(DataError, match="labels"):
        fastsal.prune(model, [images], sparsity, damping=1e-3, **options)
