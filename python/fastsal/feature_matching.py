"""What `labels="features"` needs: weights that features depend on, and the loss of matching them.

The loss is that of hints (FitNets, Romero et al., 2015): how far the features of a pruned model are
from those of the dense one. It needs neither labels nor a classifier. Its Hessian at the dense
weights, where it is zero, is exactly the Gauss–Newton matrix that the statistics estimate.

Axes: n images, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.damping import in_evaluation
from fastsal.errors import InvalidArgument
from fastsal.freezing import find_head
from fastsal.gradients.fallback import differentiate
from fastsal.gradients.inputs import to_model
from fastsal.gradients.losses import check_images
from fastsal.gradients.state import FrozenModel, PrivateRandomness, differentiable
from fastsal.holdout import Pair, mean_of
from fastsal.transfer.features import feature_outputs


def without_classifier(
    model: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    asked: str | Sequence[str] | None,
    images: Tensor | None,
) -> dict[str, nn.Parameter]:
    """Leave the classifier's weights out, which features do not depend on.

    Args:
        model: Any module.
        chosen: Name to parameter, from `select_parameters`.
        asked: What it was given; what stands there by its exact name stays.
        images: `[n, C, H, W]`; one of them tells whether the last `Linear` is the classifier, or
            part of a backbone that has none. None takes it for the classifier.

    Raises:
        DataError: Images that cannot be used.
        InvalidArgument: Nothing is left.
    """
    exact = {asked} if isinstance(asked, str) else set(asked or ())
    try:
        head = {p for module in find_head(model) for p in module.parameters()}
    except InvalidArgument:  # neither `get_classifier` nor a Linear
        head = set()
    suspects = {name: p for name, p in chosen.items() if p in head and name not in exact}
    if not suspects:
        return dict(chosen)
    reached: Collection[str] = () if images is None else _reached(model, suspects, images)
    left = {name: p for name, p in chosen.items() if not (name in suspects and name not in reached)}
    if not left:
        raise InvalidArgument(
            f"parameters: the features of {type(model).__name__} depend on none of "
            f"{', '.join(chosen)}; with labels='features' takes weights before the classifier"
        )
    return left


def _reached(model: nn.Module, candidates: Mapping[str, nn.Parameter], images: Tensor) -> list[str]:
    """Name the parameters that gradients of the features reach."""
    check_images(images)
    first = next(iter(candidates.values()))
    image = to_model(images[:1].detach().clone(), first)
    frozen = FrozenModel(model)

    def gradients(copies: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        outputs = feature_outputs(model, image)
        if not outputs.requires_grad:
            return dict.fromkeys(copies)
        found = torch.autograd.grad(outputs.sum(), list(copies.values()), allow_unused=True)
        return dict(zip(copies, found, strict=True))

    try:
        with differentiable(), PrivateRandomness(first.device).active(keep=False):
            found = differentiate(model, candidates, gradients)
    finally:
        frozen.restore()
    return [name for name, gradient in found.items() if gradient is not None]


@dataclass(frozen=True)
class HeldOutFeatures:
    """Images that the statistics did not see, and the dense model's features of them.

    Attributes:
        batches: Images `[n, ...]`.
        targets: Features `[n, F]` of each batch.
        cap: What guessing costs: the mean loss of the mean feature for every image.
    """

    batches: list[Tensor]
    targets: list[Tensor]
    cap: float

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Sequence[Pair],
        of_all: Callable[[list[Tensor]], list[Tensor]] = lambda features: features,
    ) -> HeldOutFeatures:
        """Hold images out; labels are ignored.

        Args:
            model: The dense model.
            batches: Images; none where only others are measured.
            of_all: Gives the features of all batches, in order, for those of these.
        """
        images = [pair[0] for pair in batches]
        targets = [_features(model, x) for x in images]
        variance = torch.cat(of_all(targets)).double().var(dim=0, correction=0).mean()
        # Features that are all the same, those of one image say, tell nothing about a guess.
        return cls(images, targets, float(variance) / 2 or math.inf)

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(len(x) for x in self.batches)

    def losses(self, model: nn.Module) -> list[float]:
        """Return the sum of `½ ‖f_θ(x) − f(x)‖² / F` of each batch, each counting at most `cap`."""
        found = []
        for images, target in zip(self.batches, self.targets, strict=True):
            error = _features(model, images) - target
            each = (error.square().mean(dim=1) / 2).clamp(max=self.cap)
            found.append(float(each.double().sum()))
        return found

    def mean_loss(self, model: nn.Module) -> float:
        """Return the mean over all images."""
        return mean_of(self.losses(model), self.samples)


def _features(model: nn.Module, images: Tensor) -> Tensor:
    return in_evaluation(model, images, feature_outputs)
