"""The models that are pruned, their images, and what is measured after it.

Calibration images are unlabeled and disjoint from all others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import fastsal
from benches.ridge import Heads, all_features
from fastsal.models.evaluating import to_model
from fastsal.models.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastsal.models.loading import load_model

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
CACHE = ROOT / "benches" / ".cache"  # of a model that is trained here
DATA_HELP = "folder of the data sets and of the weights"
Labeled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to prune.

    Attributes:
        model: The dense model, in evaluation mode.
        images: All calibration images `[n, C, H, W]`, on the CPU; draws are random parts of them.
        labels: Their labels, or None.
        measure: Returns the measures of a model, name to value; the first one decides.
        samples: Numbers of images of a draw.
        sparsities: Sparsities to prune to.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor | None
    measure: Callable[[nn.Module], dict[str, float]]
    samples: tuple[int, ...]
    sparsities: tuple[float, ...]

    def draw(self, seed: int, n: int) -> list[tuple[Tensor, None]]:
        """Return `n` calibration images in batches: the first ones for seed 0, else a draw."""
        images, _ = drawn(self.images, self.labels, seed, n)
        return [(x, None) for x in images.split(64)]


def drawn(images: Tensor, labels: Tensor | None, seed: int, n: int) -> tuple[Tensor, Tensor | None]:
    """Return `n` images and labels: the first ones for seed 0, else a random draw."""
    order = torch.arange(len(images))
    if seed:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:n]], None if labels is None else labels[order[:n]]


def accuracy(model: nn.Module, test: Labeled, size: int = 250) -> float:
    """Return the top-1 accuracy on test images, which lie on the CPU."""
    with torch.no_grad():
        parts = zip(*(t.split(size) for t in test), strict=True)
        right = [int((model(to_model(x, model)).cpu().argmax(1) == y).sum()) for x, y in parts]
    return sum(right) / len(test[1])


def read_npz(path: Path) -> Labeled:
    """Return images `[n, C, H, W]` in [0, 1] and labels."""
    with np.load(path, allow_pickle=False) as file:
        x = torch.from_numpy(file["x"])
        x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x[:, None]
        return x.float() / 255, torch.from_numpy(file["y"]).long()


def normalized(images: Tensor) -> Tensor:
    """Subtract the ImageNet mean from images in [0, 1], and divide by its standard deviation."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def load_resnet20(folder: Path) -> tuple[nn.Module, Labeled, Labeled]:
    """Return the CIFAR ResNet-20, its training images and its test images."""
    spec = f"{ROOT / 'examples' / 'resnet20.py'}:resnet20"
    model = load_model(spec, weights=folder / "resnet20_cifar10.safetensors")
    sets = [read_npz(folder / f"cifar10_{part}.npz") for part in ("train", "test")]
    (train, train_y), (test, test_y) = sets
    return model, (normalized(train), train_y), (normalized(test), test_y)


def resnet20(folder: Path, device: torch.device) -> Subject:
    """Return the ResNet-20, which is measured by its accuracy on 3,000 test images."""
    model, train, test = load_resnet20(folder)
    return Subject(
        model.to(device),
        *train,
        lambda m: {"accuracy": accuracy(m, test)},
        samples=(1024, 4096),
        sparsities=(0.7, 0.8, 0.9, 0.95),
    )


def load_lite0(folder: Path, device: torch.device) -> tuple[nn.Module, Labeled, Labeled]:
    """Return EfficientNet-Lite0, and the halves of `imagenet_sample` that calibrate and test."""
    from fastsal.models.lite0 import load_backbone

    model = load_backbone().eval().to(device)
    named = fastsal.load_images(folder / "imagenet_sample", class_map="imagenet")
    found = list(named.batches(fastsal.input_spec(model), 50))
    x, y = (torch.cat([pair[i] for pair in found]) for i in range(2))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    used, rest = order[:512], order[512:]
    return model, (x[used], y[used]), (x[rest], y[rest])


def lite0(folder: Path, device: torch.device) -> Subject:
    """Return EfficientNet-Lite0: half of `imagenet_sample` calibrates, the other half tests."""
    model, (x, _), test = load_lite0(folder, device)
    return Subject(
        model,
        x,
        None,
        lambda m: {"accuracy": accuracy(m, test, 61)},
        samples=(448,),
        sparsities=(0.4, 0.5, 0.6, 0.7),
    )


@dataclass(frozen=True)
class Backbone:
    """A model without a classifier.

    Attributes:
        model: The dense model.
        train: The CIFAR-10 images that calibrate, and their labels.
        photos: The ImageNet images that `measure` does not use, in groups.
        heads: Ridge heads on the dense features of CIFAR-10 and CIFAR-100, by name.
        measure: Accuracies of these heads on other images, and the error of ImageNet features.
    """

    model: nn.Module
    train: Labeled
    photos: list[Tensor]
    heads: Mapping[str, Heads]
    measure: Callable[[nn.Module], dict[str, float]]


def load_vit_small(
    folder: Path, device: torch.device, tests: int, photos: int, images: int = 512
) -> Backbone:
    """Return the ViT-S/14 of `examples/` at 126 pixels.

    Args:
        folder: Folder of the data sets and of the weights.
        device: Where it runs.
        tests: Number of test images of each data set.
        photos: Number of ImageNet images, in groups of 50 neighbors.
        images: Number of images that calibrate; those of the heads are the last 2,000 of 6,000.
    """
    spec = f"{ROOT / 'examples' / 'vit_small_dino.py'}:vit_small"
    model = load_model(spec, weights=folder / "vit_small_dino.safetensors").float().to(device)
    size = 126

    def resized(x: Tensor) -> Tensor:
        return F.interpolate(normalized(x), size=(size, size), mode="bicubic", antialias=True)

    sets: dict[str, Labeled] = {}
    heads: dict[str, Heads] = {}
    for name in ("cifar10", "cifar100"):
        train, train_y = read_npz(folder / f"{name}_train.npz")
        test, test_y = read_npz(folder / f"{name}_test.npz")
        heads[name] = Heads(all_features(model, resized(train[-2000:])), train_y[-2000:])
        sets[name] = resized(test[:tests]), test_y[:tests]
    named = fastsal.load_images(folder / "imagenet_sample")
    spec_of = fastsal.input_spec(model, size=size)
    groups = [x for x, _ in named.batches(spec_of, 50)]
    step = 50 * len(groups) // photos
    error = feature_error(model, torch.cat(groups[::step]))
    others = [group for i, group in enumerate(groups) if i % step]

    def measure(m: nn.Module) -> dict[str, float]:
        accuracies = {
            f"{name} ridge accuracy": heads[name].accuracy(all_features(m, x), y)
            for name, (x, y) in sets.items()
        }
        return {**accuracies, "ImageNet feature error": error(m)}

    train, train_y = read_npz(folder / "cifar10_train.npz")
    used = resized(train[:images]), train_y[:images]
    return Backbone(model, used, others, heads, measure)


def feature_error(dense: nn.Module, images: Tensor) -> Callable[[nn.Module], float]:
    """Return a function: squared error of the features of a model, relative to their variance."""
    wanted = all_features(dense, images).double()
    variance = (wanted - wanted.mean(0)).square().sum()

    def error(model: nn.Module) -> float:
        return float((all_features(model, images) - wanted).square().sum() / variance)

    return error


def vit_small(folder: Path, device: torch.device) -> Subject:
    """Return the ViT-S/14: ridge accuracies on 600 test images each, error of ImageNet features."""
    found = load_vit_small(folder, device, tests=600, photos=200)
    return Subject(
        found.model,
        found.train[0],
        None,
        found.measure,
        samples=(256,),
        sparsities=(0.4, 0.5, 0.6, 0.7),
    )


def load_mnist_vit(folder: Path) -> tuple[nn.Module, Labeled, Labeled]:
    """Return the small ViT of `examples/`, 1,024 training images that it never saw, and a test set.

    It is trained on the other 4,976 training images, 30 epochs, and kept in `benches/.cache`.
    """
    module = example("small_vit")
    x, y = module.load(folder / "mnist_train.npz")
    path = CACHE / "mnist_vit.safetensors"
    if not path.is_file():
        CACHE.mkdir(exist_ok=True)
        save_file(module.train(x[1024:], y[1024:], epochs=30).state_dict(), path)
    model = load_model(f"{ROOT / 'examples' / 'small_vit.py'}:small_vit", weights=path)
    return model, (x[:1024], y[:1024]), module.load(folder / "mnist_test.npz")


def mnist_vit(folder: Path, device: torch.device) -> Subject:
    """Return the small ViT of `examples/`, which is measured by its accuracy on 3,000 digits."""
    model, (x, y), test = load_mnist_vit(folder)
    return Subject(
        model.to(device),
        x,
        y,
        lambda m: {"accuracy": accuracy(m, test)},
        samples=(1024,),
        sparsities=(0.7, 0.8, 0.9, 0.95),
    )


SUBJECTS: Mapping[str, Callable[[Path, torch.device], Subject]] = {
    "resnet20": resnet20,
    "lite0": lite0,
    "vit-small": vit_small,
    "mnist-vit": mnist_vit,
}


def example(name: str) -> ModuleType:
    """Import a file of `examples/`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module: Any = None if spec is None else importlib.util.module_from_spec(spec)
    if spec is None or spec.loader is None:
        raise ImportError(f"examples/{name}.py cannot be read")
    spec.loader.exec_module(module)
    return module
