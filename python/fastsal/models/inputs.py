"""The images that a model takes: size, channels and normalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fastsal.errors import InvalidArgument

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSpec:
    """What a model takes: images `[n, channels, *size]`, normalised by `mean` and `std`.

    Attributes:
        channels: 1 for grey, 3 for RGB.
        size: `(height, width)` in pixels; None takes images as they are.
        mean: one value a channel, on the scale where white is 1.
        std: one value a channel, the same scale.
        interpolation: "bicubic", "bilinear" or "nearest", for resizing.
    """

    channels: int
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


def input_spec(
    model: nn.Module,
    *,
    channels: int | None = None,
    size: int | tuple[int, int] | Literal["native"] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> InputSpec:
    """Say what images `model` takes.

    A timm model, or one with a `pretrained_cfg` or `default_cfg`, brings its own size, mean and
    std. Any other takes ImageNet's mean and std and images of their native size.

    Args:
        model: the module.
        channels: overrides the number read from its first convolution.
        size: overrides the size in pixels: one number, `(height, width)`, or "native".
        mean: overrides the mean: one value, or one a channel.
        std: overrides the standard deviation: one value, or one a channel.

    Raises:
        InvalidArgument: a value is out of range, or the model takes one size only and `size`
            is another.
    """
    own_size, own_mean, own_std, interpolation, fixed = _own_config(model)
    channels = channels if channels is not None else _channels(model)
    chosen = _parse_size(size, own_size)
    if fixed and own_size is not None and chosen != own_size:
        came = "native" if chosen is None else f"{chosen[0]}x{chosen[1]}"
        raise InvalidArgument(
            f"size: got {came}; this model takes {own_size[0]}x{own_size[1]} only"
        )
    spec = InputSpec(
        channels=channels,
        size=chosen,
        mean=_per_channel("mean", mean, own_mean, channels),
        std=_per_channel("std", std, own_std, channels),
        interpolation=interpolation,
    )
    if min(spec.std) <= 0:
        raise InvalidArgument(f"std: got {spec.std}; takes positive values")
    return spec


_Config = tuple[
    tuple[int, int] | None, tuple[float, ...], tuple[float, ...], str, bool
]  # size, mean, std, interpolation, whether the size is the only one


def _own_config(model: nn.Module) -> _Config:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not config:
        return None, IMAGENET_MEAN, IMAGENET_STD, "bicubic", False
    import timm.data

    resolve: Any = getattr(timm.data, "resolve_model_data_config")  # noqa: B009 - untyped
    own = getattr(model, "pretrained_cfg", None)
    resolved = resolve(model) if own else resolve(model, pretrained_cfg=dict(config))
    height, width = resolved["input_size"][-2:]
    interpolation = resolved["interpolation"]
    if interpolation not in ("bicubic", "bilinear", "nearest"):
        interpolation = "bicubic"
    get = config.get if hasattr(config, "get") else lambda key: getattr(config, key, None)
    fixed = bool(get("fixed_input_size")) and not getattr(model, "dynamic_img_size", False)
    patches = getattr(model, "patch_embed", None)
    built = getattr(patches, "img_size", None)
    if fixed and isinstance(built, tuple) and len(built) == 2:
        height, width = built
    size = (int(height), int(width))
    return size, tuple(resolved["mean"]), tuple(resolved["std"]), interpolation, fixed


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module.in_channels
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size") if isinstance(config, dict) else None
    return int(shape[0]) if shape else 3


def _parse_size(size: object, own: tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return own
    if size == "native":
        return None
    pair = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(v, int) and v > 0 for v in pair)
    ):
        raise InvalidArgument(
            f"size: got {size!r}; takes pixels, (height, width), 'native' or None"
        )
    return pair[0], pair[1]


def _per_channel(
    name: str, given: float | Sequence[float] | None, own: Sequence[float], channels: int
) -> tuple[float, ...]:
    if given is None:
        if len(own) == channels:
            return tuple(float(v) for v in own)
        if channels == 1 or len(own) == 1:
            return (sum(own) / len(own),) * channels
        raise InvalidArgument(
            f"{name}: the model takes {channels} channels and its {name} has {len(own)} values; "
            f"give {name}"
        )
    values = [given] if isinstance(given, (int, float)) else list(given)
    if len(values) == 1:
        values = values * channels
    if len(values) != channels:
        raise InvalidArgument(
            f"{name}: got {len(values)} values; takes one, or one for each of {channels} channels"
        )
    return tuple(float(v) for v in values)
