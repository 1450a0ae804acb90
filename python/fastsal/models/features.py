"""The features of a backbone: the input of its classifier.

Axes: n images, f features.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument, UnsupportedLayer
from fastsal.models.outputs import FEATURES, described, output_tensor
from fastsal.models.wrappers import unwrapped
from fastsal.utils.numbers import as_integer

# timm's names of formats, and whether their last axis is that of features.
_FORMATS = {"NCHW": False, "NHWC": True, "NCL": False, "NLC": True}


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return the features of images, without gradients.

    Features of a timm model are `forward_head(forward_features(images), pre_logits=True)`. Those of
    another model with `forward_features` are its output. Those of any other model are the input of
    its last `Linear`. They are averaged over tokens `[n, tokens, f]` or pixels: `[n, f, h, w]`, or
    `[n, h, w, f]` if timm's `output_fmt` or `num_features` says so, and before a `Linear`. Of a
    dict, a tuple or an object with fields, see `outputs.output_tensor`.

    Args:
        model: Any module, or a wrapper of it; used in its current mode.
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
    model = unwrapped(model)
    if hasattr(model, "forward_features"):
        found = model.forward_features(images)  # type: ignore[operator]
        head = getattr(model, "forward_head", None)
        if head is not None and "pre_logits" in inspect.signature(head).parameters:
            found = head(found, pre_logits=True)
        channels_last = None
    else:
        found = _last_linear_input(model, images)
        channels_last = True  # a Linear maps the last axis
    try:
        found = output_tensor(found, FEATURES)
    except InvalidArgument:
        raise _wrong_features(model, found, images) from None
    if found.ndim in (3, 4):
        found = found.mean(dim=_places(model, found, channels_last))
    if found.ndim != 2 or len(found) != len(images):
        raise _wrong_features(model, found, images)
    return found


def _places(model: nn.Module, found: Tensor, channels_last: bool | None) -> tuple[int, ...]:
    """Return the axes of pixels or tokens of features.

    Args:
        model: The model.
        found: `[n, ...]` with three or four axes.
        channels_last: Whether the last axis is that of features; None if the model has to tell.
    """
    inner = tuple(range(1, found.ndim - 1))
    if channels_last is None:
        told = getattr(model, "output_fmt", None)  # a string or an enumeration, in timm
        told = str(getattr(told, "value", told)).upper()
        width = as_integer(getattr(model, "num_features", None))
        if told in _FORMATS and len(told) == found.ndim:
            channels_last = _FORMATS[told]
        elif width is not None and (found.shape[1] == width) != (found.shape[-1] == width):
            channels_last = found.shape[-1] == width
        else:
            channels_last = found.ndim == 3
    return inner if channels_last else tuple(axis + 1 for axis in inner)


def _wrong_features(model: nn.Module, found: Any, images: Tensor) -> UnsupportedLayer:
    came = list(found.shape) if isinstance(found, Tensor) else described(found)
    return UnsupportedLayer(
        f"model: the features of {type(model).__name__} must be [n, f], [n, tokens, f] or "
        f"[n, f, h, w], got {came} for n = {len(images)}"
    )


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
