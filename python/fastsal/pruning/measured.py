"""Measure losses on held-out images, by labels or by the features of the dense model.

The feature loss is that of hints (FitNets, Romero et al., 2015): the distance between the features
of the pruned and the dense model. It needs neither labels nor a classifier. Its Hessian at the
dense weights, where it is zero, is the Gauss–Newton matrix that the statistics estimate.

Axes: n images, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.gradients.losses import LossFunction, cross_entropy
from fastsal.models.evaluating import outputs
from fastsal.models.features import feature_outputs
from fastsal.models.outputs import output_tensor
from fastsal.utils.float64 import in_float64


@dataclass(frozen=True)
class HeldOutFeatures:
    """Held-out images and the dense model's features of them.

    Attributes:
        batches: Images `[n, ...]`, and labels that are ignored; the same in every iteration.
        targets: Features `[n, F]` of each batch.
        cap: Loss of guessing: the mean loss of predicting the mean feature for every image.
        samples: Number of images.
    """

    batches: Iterable[Pair]
    targets: list[Tensor]
    cap: float
    samples: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Pair],
        of_all: Callable[[list[Tensor]], list[Tensor]] = lambda features: features,
    ) -> HeldOutFeatures:
        """Compute the features of held-out images; labels are ignored.

        Args:
            model: The dense model.
            batches: Images that this process measures; may be empty.
            of_all: Returns the features of the batches of all processes, from those of `batches`.
        """
        targets = [_features(model, images) for images, _ in batches]
        variance = in_float64(torch.cat(of_all(targets))).var(dim=0, correction=0).mean()
        # With constant features (of a single image, say) the loss of guessing is undefined.
        return cls(batches, targets, float(variance) / 2 or math.inf, sum(map(len, targets)))

    def losses(self, model: nn.Module) -> list[float]:
        """Return the sum of `½ ‖f_θ(x) − f(x)‖² / F` of each batch, at most `cap` per image."""
        found = []
        for (images, _), target in zip(self.batches, self.targets, strict=True):
            error = _features(model, images) - target
            each = (error.square().mean(dim=1) / 2).clamp(max=self.cap)
            found.append(float(in_float64(each).sum()))
        return found

    def mean_loss(self, model: nn.Module) -> float:
        """Return the mean loss of a model on these images."""
        return mean_of(self.losses(model), self.samples)


def _features(model: nn.Module, images: Tensor) -> Tensor:
    found: Tensor = outputs(model, images, feature_outputs)
    return found


@dataclass(frozen=True)
class HeldOut:
    """Held-out images and their targets.

    Attributes:
        batches: Pairs `(images, labels or None)`, the same in every iteration.
        targets: For each batch without labels, the dense model's class probabilities.
        loss: `(outputs, labels)` to losses `[n]`.
        samples: Number of images.
    """

    batches: Iterable[Pair]
    targets: list[Tensor | None]
    loss: LossFunction
    samples: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Pair],
        loss: LossFunction,
    ) -> HeldOut:
        """Set the targets of held-out images: labels, or else the dense model's own outputs."""
        targets: list[Tensor | None] = []
        samples = 0
        for images, labels in batches:
            targets.append(
                None if labels is not None else output_tensor(outputs(model, images)).softmax(1)
            )
            samples += images.shape[0]
        return cls(batches, targets, loss, samples)

    def losses(self, model: nn.Module) -> list[float]:
        """Return the loss of a model on each batch, summed over its images.

        The cross-entropy of an image counts at most `log C`, the loss of guessing.
        """
        found = []
        for (images, labels), target in zip(self.batches, self.targets, strict=True):
            out = outputs(model, images)
            if labels is not None:
                losses = self.loss(out, labels.to(next(model.parameters()).device))
            elif target is not None:
                losses = F.cross_entropy(output_tensor(out), target, reduction="none")
            if labels is None or self.loss is cross_entropy:
                losses = losses.clamp(max=loss_of_guessing(out))
            found.append(float(in_float64(losses).sum()))
        return found

    def mean_loss(self, model: nn.Module) -> float:
        """Return the mean loss of a model on these images."""
        return mean_of(self.losses(model), self.samples)


def loss_of_guessing(outputs: Any) -> float:
    """Return the cross-entropy of equal logits `[n, C]`: `log C`."""
    return math.log(max(2, output_tensor(outputs).shape[1]))


class Measured(Protocol):
    """Held-out images that the loss of a model is measured on."""

    @property
    def samples(self) -> int:
        """Number of images."""

    def mean_loss(self, model: nn.Module) -> float:
        """Return the mean loss of a model on them."""


class InMicroBatches(Measured, Protocol):
    """Held-out images that are measured one micro-batch at a time."""

    def losses(self, model: nn.Module) -> list[float]:
        """Return the loss of a model on each micro-batch, summed over its images."""


def mean_of(losses: Iterable[float], samples: int) -> float:
    """Return the mean loss from sums of micro-batches, added in order on any number of ranks."""
    total = 0.0
    for loss in losses:  # `sum` rounds differently from Python 3.12 on
        total += loss
    return total / samples
