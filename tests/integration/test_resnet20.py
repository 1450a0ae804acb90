"""A published CIFAR ResNet-20, pruned with 1,024 images: accuracies and factors."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsal
from fastsal.errors import PrecisionWarning

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dense(resnet20):
    return resnet20


@pytest.fixture(scope="module")
def test_set(cifar10):
    return cifar10("test")


@pytest.fixture(scope="module")
def fisher(dense, cifar10):
    images, labels = cifar10("train", 1024)
    batches = zip(images.split(256), labels.split(256), strict=True)
    return fastsal.collect(dense, batches, samples=1024, block_size=64)


def accuracy(model, test_set):
    images, labels = test_set

    def right(part):
        x, y = part
        with torch.inference_mode():
            return int((model(x).argmax(1) == y).sum())

    with ThreadPoolExecutor(2) as pool:
        parts = zip(images.split(50), labels.split(50), strict=True)
        return sum(pool.map(right, parts)) / len(labels)


def test_dense(dense, test_set):
    assert sum(p.numel() for p in fastsal.select_parameters(dense).values()) == 268_336
    assert accuracy(dense, test_set) == pytest.approx(0.916, abs=0.001)


TABLE = {
    ("magnitude", None): {0.3: 0.912, 0.5: 0.897, 0.6: 0.834, 0.7: 0.721},
    ("diag-fisher", None): {0.3: 0.904, 0.5: 0.719, 0.6: 0.421, 0.7: 0.243},
    ("block-fisher", 1e-5): {0.3: 0.915, 0.5: 0.898, 0.6: 0.839, 0.7: 0.701},
    ("block-fisher", 1e-3): {0.3: 0.912, 0.5: 0.900, 0.6: 0.848, 0.7: 0.733},
}


@pytest.mark.parametrize(("criterion", "damping"), TABLE)
def test_accuracies_of_masks(dense, fisher, test_set, criterion, damping):
    given = {} if damping is None else {"damping": damping}
    scores = fastsal.score(dense, fisher, criterion, **given)
    for sparsity, want in TABLE[criterion, damping].items():
        model = copy.deepcopy(dense)
        masks = fastsal.rank(scores, sparsity)
        masks.apply(model)
        masks.verify(model)
        assert masks.total - sum(masks.kept.values()) == round(sparsity * masks.total)
        assert accuracy(model, test_set) == pytest.approx(want, abs=0.01), sparsity


def test_greedy_elimination_with_joint_compensation(dense, fisher, test_set):
    scores = fastsal.score(dense, fisher, "obs-greedy", 1e-5)
    for sparsity, least in {0.6: 0.895, 0.7: 0.865, 0.8: 0.775, 0.9: 0.30}.items():
        model = copy.deepcopy(dense)
        masks = fastsal.rank(scores, sparsity)
        report = fastsal.compensate(model, fisher, masks, 1e-5)
        masks.verify(model)
        assert report.total < report.total_uncompensated
        assert accuracy(model, test_set) >= least, sparsity


@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-4, 1e-2, 1.0])
def test_inverse_diagonals(fisher, damping):
    inverses = fisher.inverse_diagonals(damping)
    # The first and the last layers and one in between: 145 blocks, a short one among them.
    for name in ("conv1.weight", "layer2.1.conv2.weight", "linear.weight"):
        a = fisher.blocks(name)
        size = min(64, int(np.prod(fisher.shapes[name])))
        a = a[:, :size, :size] + damping * torch.eye(size, dtype=torch.float64)
        want = torch.linalg.inv(a).diagonal(dim1=1, dim2=2).reshape(-1)
        got = torch.from_numpy(inverses[name].values)
        assert inverses[name].failed == []
        assert ((got / want[: len(got)] - 1).abs() < 1e-6).all(), name


def test_precision_warning_where_damping_is_tiny(dense, fisher):
    with pytest.warns(PrecisionWarning, match="^scores of '.*weight'.*precision='float64'"):
        fastsal.score(dense, fisher, "block-fisher", 1e-8)
