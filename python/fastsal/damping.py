"""The choice of `λ`: by the loss that candidates leave on images that the statistics never saw.

One set of statistics serves all candidates; each costs a score, a mask, a compensation and a
forward pass over the held-out images, together less than one more round of statistics.

Where much is pruned at once the outcome is rough in `λ` and in the samples: the same `λ` with a few
more samples may come out far worse. So it is the pruned model that was measured which is kept, not
the `λ` alone. And an image that is worse than guessed counts as guessed: there a few images that
are wrong with great confidence would decide by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsal.errors import DataError, FactorizationError
from fastsal.fisher import BlockFisher
from fastsal.gradients.inputs import to_model
from fastsal.gradients.losses import cross_entropy
from fastsal.holdout import mean_of

# Multiples of the mean squared gradient, which has the unit of `λ`. Half decades, because the loss
# is flat around its best λ.
_MULTIPLES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)


@dataclass(frozen=True)
class DampingChoice:
    """A chosen `λ` and why.

    Attributes:
        damping: The `λ` with the least held-out loss.
        evidence: Pairs `(λ, held-out loss)`, rising in `λ`; NaN where blocks could not be factored.
    """

    damping: float
    evidence: list[tuple[float, float]]


@dataclass(frozen=True)
class HeldOut:
    """Images that the statistics did not see, and what to expect of them.

    Attributes:
        batches: Pairs `(images, labels or None)`.
        targets: For each batch without labels, the dense model's class probabilities.
        loss: `(outputs, labels)` to losses `[n]`.
    """

    batches: list[tuple[Tensor, Tensor | None]]
    targets: list[Tensor | None]
    loss: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: list[tuple[Tensor, Tensor | None]],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> HeldOut:
        """Hold images out; where they have no labels the dense model's own outputs stand in."""
        targets = [
            None if labels is not None else outputs(model, images).softmax(1)
            for images, labels in batches
        ]
        return cls(batches, targets, loss)

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(images.shape[0] for images, _ in self.batches)

    def losses(self, model: nn.Module) -> list[float]:
        """Return the loss of a model on each batch, summed over its images.

        A cross-entropy counts at most what guessing costs, `log C`.
        """
        found = []
        for (images, labels), target in zip(self.batches, self.targets, strict=True):
            out = outputs(model, images)
            if labels is not None:
                losses = self.loss(out, labels.to(out.device))
            elif target is not None:
                losses = F.cross_entropy(out, target, reduction="none")
            if labels is None or self.loss is cross_entropy:
                losses = losses.clamp(max=loss_of_guessing(out))
            found.append(float(losses.double().sum()))
        return found

    def mean_loss(self, model: nn.Module) -> float:
        """Return the mean loss of a model on these images."""
        return mean_of(self.losses(model), self.samples)


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """What a model puts out in evaluation mode; its modes are restored."""
    return in_evaluation(model, images, lambda model, images: model(images))


def in_evaluation(
    model: nn.Module, images: Tensor, call: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """What `call(model, images)` returns in evaluation mode, float32; its modes are restored."""
    first = next(model.parameters())
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return call(model, to_model(images, first)).float()
    finally:
        for module, mode in modes:
            module.training = mode


def loss_of_guessing(outputs: Tensor) -> float:
    """Return the cross-entropy of equal logits `[n, C]`: `log C`."""
    return math.log(max(2, outputs.shape[1]))


def candidates(fisher: BlockFisher) -> list[float]:
    """Return dampings to try, rising: multiples of the mean squared gradient."""
    total, count = fisher._squares()
    return candidates_of(total / count)


def candidates_of(mean: float) -> list[float]:
    """Return dampings to try, rising, for a mean squared gradient."""
    smallest = 1e-30  # a model whose gradients are all zero still gets a damping
    return [float(f"{max(m * mean, smallest):.2g}") for m in _MULTIPLES]


def choose_damping(
    grid: Sequence[float], prune_with: Callable[[float], None], loss: Callable[[], float]
) -> DampingChoice:
    """Return the damping with the least held-out loss.

    Args:
        grid: Dampings, rising.
        prune_with: Prunes the model with a damping, from the same start each time.
        loss: The pruned model's held-out loss.

    Raises:
        FactorizationError: No damping of the grid can be factored.
        DataError: The held-out loss is NaN with all of them.
    """
    evidence: list[tuple[float, float]] = []
    failure: FactorizationError | None = None
    for damping in grid:
        try:
            prune_with(damping)
            evidence.append((damping, loss()))
        except FactorizationError as error:
            failure = error
            evidence.append((damping, float("nan")))
    usable = [(value, damping) for damping, value in evidence if not math.isnan(value)]
    if not usable:
        raise failure or DataError(
            "batches: the loss of the held-out images is NaN with every damping; look at the "
            "images and at the model's precision, or give a damping"
        )
    return DampingChoice(min(usable)[1], evidence)
