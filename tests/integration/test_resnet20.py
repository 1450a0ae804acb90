"""A published CIFAR ResNet-20, pruned with 1,024 images: accuracies and factors."""

from __future__ import annotations

import copy
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastsal
from fastsal.errors import PrecisionWarning

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Layers this small mostly wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_images(path, count=None):
    """Images normalised by the mean and the standard deviation of ImageNet, and labels."""
    with np.load(path) as data:
        x, y = data["x"][:count], data["y"][:count]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(x) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(y).long()


@pytest.fixture(scope="module")
def dense(shared_data):
    spec = importlib.util.spec_from_file_location("resnet20", ROOT / "examples" / "resnet20.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.resnet20().eval()
    model.load_state_dict(load_file(shared_data / "resnet20_cifar10.safetensors"))
    return model


@pytest.fixture(scope="module")
def test_set(shared_data):
    return open_images(shared_data / "cifar10_test.npz")


@pytest.fixture(scope="module")
def fisher(dense, shared_data):
    images, labels = open_images(shared_data / "cifar10_train.npz", 1024)
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
