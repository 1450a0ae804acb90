"""The models whose units are removed, their images, and what is measured after it.

Calibration images are disjoint from those of the test and of the ridge heads. Their labels are used
by peers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches.quality.subjects import (
    Labeled,
    accuracy,
    drawn,
    feature_error,
    load_lite0,
    load_mnist_vit,
    load_resnet20,
    load_vit_small,
)
from fastsal.utils.choices import Budget, Structure

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Goal:
    """What to remove: a fraction of the units of a structure, or of the multiply-accumulates."""

    structure: Structure
    fraction: float
    budget: Budget = "units"

    def __str__(self) -> str:
        of = "" if self.budget == "units" else f" of {self.budget}"
        return f"{self.fraction:g} of {self.structure}" if not of else f"{self.fraction:g}{of}"


@dataclass(frozen=True)
class Subject:
    """A model whose units are removed.

    Attributes:
        model: The dense model, in evaluation mode.
        images: All calibration images `[n, C, H, W]`, on the CPU; draws are random parts of them.
        labels: Their labels.
        measure: Returns the measures of a model, name to value; the first one decides.
        samples: Number of images of a draw.
        goals: What to remove.
        multiple: Multiple of the widths; None for the default.
        head: Classifier of the features for peers that need a loss; None if the model has one.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    measure: Callable[[nn.Module], dict[str, float]]
    samples: int
    goals: tuple[Goal, ...]
    multiple: int | None = None
    head: nn.Linear | None = None

    def draw(self, seed: int) -> Batches:
        """Return calibration images in batches: the first ones for seed 0, else a draw."""
        x, y = drawn(self.images, self.labels, seed, self.samples)
        assert y is not None
        return list(zip(x.split(64), y.split(64), strict=True))


def _halves(*structures: Structure) -> tuple[Goal, ...]:
    return tuple(Goal(s, fraction) for s in structures for fraction in (0.25, 0.5))


def classified(
    dense: nn.Module, test: Labeled, size: int
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that measures accuracy on test images and the error of their features."""
    error = feature_error(dense, test[0][:250])
    return lambda m: {"accuracy": accuracy(m, test, size), "feature error": error(m)}


def vit_small(folder: Path, device: torch.device, samples: int = 256) -> Subject:
    """Return the ViT-S/14: ridge accuracies on 400 test images each, error of ImageNet features.

    Draws of up to 512 images are from the first 512, larger ones from the first 4,000.
    """
    pool = 512 if samples <= 512 else 4000
    found = load_vit_small(folder, device, tests=400, photos=100, images=pool)
    ridge = found.heads["cifar10"]
    head = nn.Linear(*reversed(ridge.weight.shape))
    head.load_state_dict({"weight": ridge.weight, "bias": ridge.bias})
    goals = _halves("mlp", "heads")
    return Subject(found.model, *found.train, found.measure, samples, goals, head=head.to(device))


def vit_small_mixed(folder: Path, device: torch.device, samples: int = 4900) -> Subject:
    """Return the ViT-S/14 with 4,000 images of CIFAR-10 and 900 of ImageNet to draw from.

    All 3,000 test images of each data set are measured. Photos have the label -1, which no loss
    accepts.
    """
    found = load_vit_small(folder, device, tests=3000, photos=100, images=4000)
    images, labels = found.train
    pool = torch.cat([images, *found.photos])
    labels = F.pad(labels, (0, len(pool) - len(labels)), value=-1)
    x, y = drawn(pool, labels, 1, len(pool))  # so that the first ones are of both
    assert y is not None
    return Subject(found.model, x, y, found.measure, samples, (Goal("mlp", 0.5),))


def mnist_vit(folder: Path, device: torch.device, samples: int = 256) -> Subject:
    """Return the small ViT of `examples/`; its layers are too narrow for multiples."""
    model, (x, y), test = load_mnist_vit(folder)
    model.to(device)
    measure = classified(model, test, 250)
    return Subject(model, x, y, measure, samples, _halves("mlp", "heads"), 1)


def lite0(folder: Path, device: torch.device, samples: int = 256) -> Subject:
    """Return EfficientNet-Lite0: half of `imagenet_sample` calibrates, the other half tests."""
    model, train, test = load_lite0(folder, device)
    goals = (*_halves("channels"), Goal("channels", 0.3, "macs"))
    return Subject(model, *train, classified(model, test, 61), samples, goals)


def resnet20(folder: Path, device: torch.device, samples: int = 512) -> Subject:
    """Return the ResNet-20 on CIFAR-10; its layers are too narrow for multiples."""
    model, train, test = load_resnet20(folder)
    model.to(device)
    goals = (*_halves("channels"), Goal("channels", 0.3, "macs"))
    return Subject(model, *train, classified(model, test, 250), samples, goals, 1)


SUBJECTS: Mapping[str, Callable[..., Subject]] = {
    "resnet20": resnet20,
    "mnist-vit": mnist_vit,
    "vit-small": vit_small,
    "vit-small-mixed": vit_small_mixed,
    "lite0": lite0,
}
