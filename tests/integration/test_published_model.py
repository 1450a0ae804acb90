"""The published ResNet-20: accuracies of a plain float64 reference, and its real gradients."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastsal

ROOT = Path(__file__).resolve().parents[2]
SPARSITIES = (0.3, 0.5, 0.6, 0.7)


@pytest.fixture(scope="module")
def published(shared_data):
    """The model, the first 1,024 training images, the test images."""
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("resnet20", ROOT / "examples" / "resnet20.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.resnet20()
    model.load_state_dict(load_file(shared_data / "resnet20_cifar10.safetensors"))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    sets = []
    for part, count in (("train", 1024), ("test", None)):
        with np.load(shared_data / f"cifar10_{part}.npz", allow_pickle=False) as file:
            x = torch.from_numpy(file["x"][:count]).permute(0, 3, 1, 2).float() / 255
            sets.append(((x - mean) / std, torch.from_numpy(file["y"][:count]).long()))
    return model.eval(), *sets


@pytest.fixture(scope="module")
def fisher(published):
    model, train, _ = published
    return fastsal.collect(model, [train])


def accuracy(model: nn.Module, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(*(t.split(500) for t in test))]
    return int(sum(right)) / len(test[1])


def test_dense(published):
    assert accuracy(published[0], published[2]) == pytest.approx(0.916, abs=1e-3)


@pytest.mark.parametrize(
    ("criterion", "damping", "expected"),
    [
        ("magnitude", 1e-5, (0.912, 0.897, 0.834, 0.721)),
        ("diag-fisher", 1e-5, (0.904, 0.719, 0.421, 0.243)),
        ("block-fisher", 1e-5, (0.915, 0.898, 0.839, 0.701)),
        ("block-fisher", 1e-3, (0.912, 0.900, 0.848, 0.733)),
    ],
)
def test_masks_alone(published, fisher, criterion, damping, expected):
    model, _, test = published
    scores = fastsal.score(model, fisher, criterion, damping)
    for sparsity, wanted in zip(SPARSITIES, expected, strict=True):
        pruned = copy.deepcopy(model)
        fastsal.rank(scores, sparsity).apply(pruned)
        assert accuracy(pruned, test) == pytest.approx(wanted, abs=0.01)


def test_greedy_with_joint_compensation(published, fisher):
    model, _, test = published
    scores = fastsal.score(model, fisher, "obs-greedy", 1e-5)
    for sparsity, least in ((0.6, 0.89), (0.7, 0.86), (0.8, 0.77), (0.9, 0.28)):
        pruned = copy.deepcopy(model)
        masks = fastsal.rank(scores, sparsity)
        report = fastsal.compensate(pruned, fisher, masks, 1e-5)
        masks.verify(pruned)
        assert report.total < report.total_uncompensated
        assert accuracy(pruned, test) >= least


@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-3])
def test_inverse_diagonal_of_real_gradients(fisher, damping):
    inverses = fisher.inverse_diagonals(damping)
    for name in fisher.names:
        blocks = fisher.blocks(name)
        eye = torch.eye(blocks.shape[1], dtype=torch.float64)
        exact = torch.linalg.inv(blocks + damping * eye).diagonal(dim1=1, dim2=2).flatten()
        values = inverses[name].values
        assert np.abs(values / exact[: len(values)].numpy() - 1).max() < 1e-6
