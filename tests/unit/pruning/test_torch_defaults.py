"""Results do not depend on the default type and the default device of PyTorch."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal.models.inputs import InputSpec
from fastsal.pruning.refit.draws import flip_and_shift

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "empirical": {"sparsity": 0.6, "damping": "auto"},
    "features": {
        "curvature": "features",
        "sparsity": 0.6,
        "reconstruct": True,
        "refit": fastsal.Refit(steps=2, checks=1),
    },
    "2:4": {"pattern": "2:4"},
    "1x4": {"pattern": "1x4", "sparsity": 0.5},
    "random": {"criterion": "random", "compensate": False, "sparsity": 0.6},
    "sampled": {"curvature": "sampled", "sparsity": 0.6, "memory_budget": "4GiB"},
}


@contextlib.contextmanager
def default(which):
    try:
        if isinstance(which, torch.dtype):
            torch.set_default_dtype(which)
        else:
            torch.set_default_device(which)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 4, 4, generator=generator)
    return [(images[i : i + 8], torch.arange(8) % 4) for i in range(0, 32, 8)]


# The default device stands for a GPU: what is made on it by mistake cannot be used.
@pytest.mark.parametrize("which", [torch.bfloat16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_prune(name, which):
    given = {"damping": "0.1x"} | CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 8),
            nn.ReLU(),
            nn.Linear(8, 4),
        )
    batches, other = data(), copy.deepcopy(model)
    expected = fastsal.prune(model, batches, **given)
    with default(which):
        found = fastsal.prune(other, batches, **given)
        found.masks.verify(other)
    assert found.masks == expected.masks
    assert all(scores.dtype == torch.float32 for scores in found.scores.values())
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


# Rounding in bfloat16 would be seen in the widths and in the weights.
@pytest.mark.parametrize("which", [torch.bfloat16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("criterion", ["joint", "random"])
def test_prune_structure(criterion, which):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 4),
        ).eval()
    batches, other = data(), copy.deepcopy(model)
    given = {"structure": "channels", "multiple": 1, "criterion": criterion}
    expected = fastsal.prune_structure(model, batches, 0.4, **given)
    with default(which):
        found = fastsal.prune_structure(other, batches, 0.4, **given)
    assert found.widths == expected.widths
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("which", [torch.bfloat16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("kind", ["ridge", "knn", "probe"])
def test_heads(kind, which):
    x = np.random.default_rng(0).integers(0, 256, (48, 4, 4, 3)).astype(np.uint8)
    y = np.arange(48) % 3
    x[y == 1] //= 2
    images = fastsal.ImageSet(x, y, ("a", "b", "c"), "drawn")
    task = fastsal.Task.cut("t", images)
    spec = InputSpec(3, (4, 4), (0.5,) * 3, (0.5,) * 3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3))

    def accuracies():
        heads = fastsal.fit_heads(model, [task], kind=kind, k=3, spec=spec)
        return fastsal.evaluate(model, [task], heads)

    expected = accuracies()
    with default(which):
        assert accuracies() == expected


@pytest.mark.parametrize("which", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_images_are_augmented(which):
    (images, _), *_ = data()

    def augmented():
        return flip_and_shift(images, torch.Generator().manual_seed(3))

    expected = augmented()
    assert not torch.equal(expected, images)
    with default(which):
        assert torch.equal(augmented(), expected)
