"""The features of a backbone: the input of its classifier.

Axes: n images, f features.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument, UnsupportedLayer
from fastsal.models.classifier import chosen_head, trace_head, using_head
from fastsal.models.evaluating import input_of
from fastsal.models.hooks import hooked
from fastsal.models.outputs import FEATURES, described, output_tensor
from fastsal.models.wrappers import unwrapped
from fastsal.utils.numbers import as_integer

# timm's names of formats, and whether their last axis is that of features.
_FORMATS = {"NCHW": False, "NHWC": True, "NCL": False, "NLC": True}


def features(
    model: nn.Module, images: Tensor, *, head: str | Sequence[str] | None = None
) -> Tensor:
    """Return the features of images, without gradients.

    Features of a timm model are `forward_head(forward_features(images), pre_logits=True)`. Those of
    another model with `forward_features` are its output. Those of any other model are the input of
    the layer that produces its output. They are averaged over tokens `[n, tokens, f]` or pixels:
    `[n, f, h, w]`, or `[n, h, w, f]` if timm's `output_fmt` or `num_features` says so, and before a
    `Linear`. Of a dict, a tuple or an object with fields, see `outputs.output_tensor`.

    Args:
        model: Any module, or a wrapper of it; used in its current mode.
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
    model = unwrapped(model)
    if not chosen_head(model) and not hasattr(model, "forward_features"):
        trace_head(model, images)


def feature_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the features of images as `features` does, with a graph if gradients are enabled."""
    model = unwrapped(model)
    if hasattr(model, "forward_features") and not chosen_head(model):
        found = model.forward_features(images)  # type: ignore[operator]
        head = getattr(model, "forward_head", None)
        if head is not None and "pre_logits" in inspect.signature(head).parameters:
            found = head(found, pre_logits=True)
        channels_last = None
    else:
        found, is_linear = _head_input(model, images)
        channels_last = is_linear or None  # a Linear maps the last axis
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


def _head_input(model: nn.Module, images: Tensor) -> tuple[Tensor, bool]:
    """Return the input of the head, and whether the head is a `Linear`."""
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
    with hooked(
        layer.register_forward_pre_hook(
            lambda _, args, named: caught.append(input_of(args, named)), with_kwargs=True
        )
        for layer in layers
    ):
        model(images)
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
    return caught[-1], isinstance(layers[-1], nn.Linear)
