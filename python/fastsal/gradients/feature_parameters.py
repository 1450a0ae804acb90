"""Selection of the parameters that the features of a model depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.gradients.fallback import differentiate
from fastsal.gradients.losses import check_images
from fastsal.gradients.state import PrivateRandomness, frozen
from fastsal.models.classifier import chosen_head, classifier_of
from fastsal.models.evaluating import differentiable, to_model, twice
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
        images: `[n, C, H, W]`; the first ones are used to find the classifier, and whether features
            depend on it. None assumes that they do not.

    Raises:
        DataError: The images are invalid.
        InvalidArgument: No parameter is left.
    """
    given = [asked] if isinstance(asked, str) else list(asked or ())
    exact = set(renamed(given, chosen).values())
    head = {p for module in classifier_of(model, images) for p in module.parameters()}
    if chosen_head(model):  # layers may follow it
        head |= set(chosen.values())
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
    pair = to_model(twice(images[:1].detach()), model)

    def gradients(copies: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        outputs = feature_outputs(model, pair)
        if not outputs.requires_grad:
            return dict.fromkeys(copies)
        found = torch.autograd.grad(outputs.sum(), list(copies.values()), allow_unused=True)
        return dict(zip(copies, found, strict=True))

    with frozen(model), differentiable(), PrivateRandomness(first.device).active(keep=False):
        found = differentiate(model, candidates, gradients)
    return [name for name, gradient in found.items() if gradient is not None]
