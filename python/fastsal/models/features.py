"""The features of a backbone: what its classifier is given.

Axes: n images, f features.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fastsal.errors import UnsupportedLayer


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the classifier of `model` is given for `images`, without gradients.

    A timm model is asked by `forward_features` and `forward_head(pre_logits=True)`. Another with
    `forward_features` gives its output, averaged over pixels `[n, f, h, w]` or tokens
    `[n, tokens, f]`. For any other it is the input of the last `Linear`.

    Args:
        model: the module; used in the mode that it is in.
        images: `[n, c, h, w]`, on the device of the model.

    Returns:
        `[n, f]`.

    Raises:
        UnsupportedLayer: the model has neither `forward_features` nor a `Linear`, or its features
            have another shape.
    """
    with torch.no_grad():
        return feature_outputs(model, images)


def feature_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the same as `features`, with a graph for gradients where they are asked for."""
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
            f"model: the features of {type(model).__name__} are {came} for {len(images)} images; "
            "takes [n, f], [n, tokens, f] or [n, f, h, w]"
        )
    return found


def _last_linear_input(model: nn.Module, images: Tensor) -> Tensor:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UnsupportedLayer(
            f"model: {type(model).__name__} has neither forward_features nor a Linear, so its "
            "features cannot be told; define forward_features(images) -> [n, f]"
        )
    caught: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        model(images)
    finally:
        hook.remove()
    if not caught:
        raise UnsupportedLayer(
            f"model: the last Linear of {type(model).__name__} took no part in its forward; "
            "define forward_features(images) -> [n, f]"
        )
    return caught[-1]
