"""Selection of the parameters that the features of a model depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.gradients.fallback import differentiate
from fastsal.gradients.losses import check_images
from fastsal.gradients.state import PrivateRandomness, differentiable, frozen
from fastsal.models.classifier import find_head
from fastsal.models.evaluating import to_model
from fastsal.models.features import feature_outputs
from fastsal.models.wrappers import renamed


def without_classifier(
    model: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    asked: str | Sequence[str] | None,
    images: Tensor | None,
) -> dict[str, nn.Parameter]:
    """Exclude the weights of the classifier, which features do not depend on.

    Args:
        model: Any module.
        chosen: Name to parameter, from `select_parameters`.
        asked: Argument of `select_parameters`; weights named there exactly are not excluded.
        images: `[n, C, H, W]`; the first image is used to decide whether the last `Linear` is the
            classifier or a part of the backbone. None assumes the classifier.

    Raises:
        DataError: The images are invalid.
        InvalidArgument: No parameter is left.
    """
    given = [asked] if isinstance(asked, str) else list(asked or ())
    exact = set(renamed(given, chosen).values())
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
            f"parameters must include weights before the classifier of {type(model).__name__} "
            f"with curvature='features', got {', '.join(chosen)}"
        )
    return left


def _reached(model: nn.Module, candidates: Mapping[str, nn.Parameter], images: Tensor) -> list[str]:
    """Return the names of the parameters that the features depend on."""
    check_images(images)
    first = next(iter(candidates.values()))
    image = to_model(images[:1].detach().clone(), first)

    def gradients(copies: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        outputs = feature_outputs(model, image)
        if not outputs.requires_grad:
            return dict.fromkeys(copies)
        found = torch.autograd.grad(outputs.sum(), list(copies.values()), allow_unused=True)
        return dict(zip(copies, found, strict=True))

    with frozen(model), differentiable(), PrivateRandomness(first.device).active(keep=False):
        found = differentiate(model, candidates, gradients)
    return [name for name, gradient in found.items() if gradient is not None]
