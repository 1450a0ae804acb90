"""Parameters that the features of a model depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.gradients.fallback import differentiate
from fastsal.gradients.losses import check_images
from fastsal.gradients.state import FrozenModel, PrivateRandomness, differentiable
from fastsal.models.classifier import find_head
from fastsal.models.evaluating import to_model
from fastsal.models.features import feature_outputs


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
            f"{', '.join(chosen)}; with curvature='features' takes weights before the classifier"
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
