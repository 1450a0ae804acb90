"""The features of a backbone: the input of its classifier.

Axes: n images, f features.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fastsal.errors import UnsupportedLayer


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return the features of images, without gradients.

    Features of a timm model are `forward_head(forward_features(images), pre_logits=True)`. Those of
    another model with `forward_features` are its output, averaged over pixels `[n, f, h, w]` or
    tokens `[n, tokens, f]`. Those of any other model are the input of its last `Linear`.

    Args:
        model: Any module; used in its current mode.
        images: `[n, c, h, w]`, on the device of the model.

    Returns:
        `[n, f]`.

    Raises:
        UnsupportedLayer: The model has neither `forward_features` nor a `Linear`, or its features
            have another shape.
    """
    with torch.no_grad():
        return feature_outputs(model, images)


def feature_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the features of images as `features` does, with a graph if gradients are enabled."""
    if hasattr(model, "forward_features"):
        found = model.forward_features(images)  # type: ignore[operator]
        head = getattr(model, "forward_head", None)
        if head is not None and "pre_logits" in inspect.signature(head).parameters:
            found = head(found, pre_logits=True)
    else:
        found = _last_linear_input(model, images)
    if isinstance(found, Tensor) and found.ndim == 4:
        found = found.mean(dim=(2, 3))
    elif isinstance(found, Tensor) and found.ndim == 3:
        found = found.mean(dim=1)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
        came = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UnsupportedLayer(
            f"model: the features of {type(model).__name__} must be [n, f], [n, tokens, f] or "
            f"[n, f, h, w], got {came} for n = {len(images)}"
        )
    return found


def _last_linear_input(model: nn.Module, images: Tensor) -> Tensor:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UnsupportedLayer(
            f"model: {type(model).__name__} has neither forward_features nor a Linear layer, so "
            "its features are undefined; define forward_features(images) -> [n, f]"
        )
    caught: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        model(images)
    finally:
        hook.remove()
    if not caught:
        raise UnsupportedLayer(
            f"model: the last Linear of {type(model).__name__} is not called by its forward; "
            "define forward_features(images) -> [n, f]"
        )
    return caught[-1]
