"""The features of a backbone: the input of its classifier.

Axes: n images, f features.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastsal.errors import UnsupportedLayer
from fastsal.models.classifier import chosen_head, trace_head, using_head


def features(
    model: nn.Module, images: Tensor, *, head: str | Sequence[str] | None = None
) -> Tensor:
    """Return the features of images, without gradients.

    Features of a timm model are `forward_head(forward_features(images), pre_logits=True)`. Those of
    another model with `forward_features` are its output, averaged over pixels `[n, f, h, w]` or
    tokens `[n, tokens, f]`. Those of any other model are the input of the layer that produces its
    output.

    Args:
        model: Any module; used in its current mode.
        images: `[n, c, h, w]`, on the device of the model.
        head: Name of the layer whose input is the features; None finds it.

    Returns:
        `[n, f]`.

    Raises:
        InvalidArgument: The model has no layer `head`.
        UnsupportedLayer: The model has neither `forward_features` nor a layer that alone produces
            its output, or its features have another shape.
    """
    with torch.no_grad(), using_head(model, head):
        return feature_outputs(model, images)


def find_feature_layer(model: nn.Module, images: Tensor) -> None:
    """Find the layer whose input is the features, which later passes then know.

    Passes that intercept or transform operations cannot trace the model.
    """
    if not chosen_head(model) and not hasattr(model, "forward_features"):
        trace_head(model, images)


def feature_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the features of images as `features` does, with a graph if gradients are enabled."""
    if hasattr(model, "forward_features") and not chosen_head(model):
        found = model.forward_features(images)  # type: ignore[operator]
        head = getattr(model, "forward_head", None)
        if head is not None and "pre_logits" in inspect.signature(head).parameters:
            found = head(found, pre_logits=True)
    else:
        found = _head_input(model, images)
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


def _head_input(model: nn.Module, images: Tensor) -> Tensor:
    layers: list[nn.Module] | None = chosen_head(model) or trace_head(model, images)
    if layers is None:  # the model does not run on these images; its own error follows
        linear: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
        layers = linear[-1:]
    name = type(model).__name__
    if not layers:
        raise UnsupportedLayer(
            f"model: {name} has neither forward_features nor a Linear layer that alone produces "
            "its output, so its features are undefined; define forward_features(images) -> [n, f], "
            "or name the layer whose input they are with head"
        )
    caught: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for layer in layers
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not caught:
        raise UnsupportedLayer(
            f"model: the classifier of {name} is not called as a module by its forward; define "
            "forward_features(images) -> [n, f]"
        )
    if len(layers) > 1 and any(x is not caught[0] for x in caught):
        raise UnsupportedLayer(
            f"model: the {len(layers)} heads of {name} have different inputs; define "
            "forward_features(images) -> [n, f], or name one head with head"
        )
    return caught[-1]
