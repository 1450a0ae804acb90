"""Input images of a model: size, channels and normalization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import as_integer, real, whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bicubic", "bilinear", "nearest"]


@dataclass(frozen=True)
class InputSpec:
    """Input of a model: images `[n, channels, *size]`, normalized by `mean` and `std`.

    Attributes:
        channels: Number of channels, 1 for grayscale, 3 for RGB.
        size: `(height, width)` in pixels; None keeps the size of the images.
        mean: Per-channel mean for pixels in [0, 1].
        std: Per-channel standard deviation for pixels in [0, 1].
        interpolation: Interpolation for resizing: "bicubic", "bilinear" or "nearest".
    """

    channels: int
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"


def input_spec(
    model: nn.Module,
    *,
    channels: int | None = None,
    size: int | tuple[int, int] | Literal["native"] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> InputSpec:
    """Return the size, channels and normalization of the images that `model` expects.

    Size, mean and std are read from `pretrained_cfg` or `default_cfg`, as timm's models have it.
    The defaults for other models are the mean and std of ImageNet, and images of their own size.

    Args:
        model: Any module.
        channels: Number of channels; None reads it from the first convolution.
        size: Size in pixels: one number, `(height, width)`, or "native" to keep that of the images.
        mean: Per-channel mean for pixels in [0, 1], or one value for all channels.
        std: Per-channel standard deviation for pixels in [0, 1], or one value for all channels.

    Raises:
        InvalidArgument: A value is out of range, or `size` differs from the only size that the
            model supports.
    """
    own_size, own_mean, own_std, interpolation, fixed = _own_config(model)
    channels = _channels(model) if channels is None else whole("channels", channels, 1)
    chosen = _parse_size(size, own_size)
    if fixed and own_size is not None and chosen != own_size:
        came = "native" if chosen is None else f"{chosen[0]}x{chosen[1]}"
        raise InvalidArgument(
            f"size must be {own_size[0]}x{own_size[1]} for this model, got {came}"
        )
    spec = InputSpec(
        channels=channels,
        size=chosen,
        mean=_per_channel("mean", mean, own_mean, channels),
        std=_per_channel("std", std, own_std, channels),
        interpolation=interpolation,
    )
    if min(spec.std) <= 0:
        raise InvalidArgument(f"std must be positive, got {min(spec.std)}")
    return spec


def example_images(model: nn.Module) -> Tensor:
    """Return two random images `[2, C, H, W]` as a model expects them, of 224 pixels by default."""
    spec = input_spec(model, mean=0.0, std=1.0)  # values that every number of channels has
    height, width = spec.size or (224, 224)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, spec.channels, height, width, generator=generator)


_Config = tuple[
    tuple[int, int] | None, tuple[float, ...], tuple[float, ...], Interpolation, bool
]  # size, mean, std, interpolation, whether no other size is supported


def _own_config(model: nn.Module) -> _Config:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not config:
        return None, IMAGENET_MEAN, IMAGENET_STD, "bicubic", False
    import timm.data

    resolve: Any = getattr(timm.data, "resolve_model_data_config")  # noqa: B009 - untyped
    own = getattr(model, "pretrained_cfg", None)
    resolved = resolve(model) if own else resolve(model, pretrained_cfg=dict(config))
    height, width = resolved["input_size"][-2:]
    named = resolved["interpolation"]
    interpolation: Interpolation = named if named in get_args(Interpolation) else "bicubic"
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
    if isinstance(size, str) and size == "native":
        return None
    pair: list[Any] = []
    if as_integer(size) is not None:
        pair = [as_integer(size)] * 2
    elif isinstance(size, Iterable) and not isinstance(size, str) and getattr(size, "ndim", 1) != 0:
        pair = [as_integer(v) for v in size]
    if len(pair) != 2 or None in pair or min(pair) < 1:
        raise InvalidArgument(
            f"size must be pixels, (height, width), 'native' or None, got {size!r:.80}"
        )
    return pair[0], pair[1]


def _per_channel(
    name: str, given: object, own: Sequence[float], channels: int
) -> tuple[float, ...]:
    if given is None:
        if len(own) == channels:
            return tuple(float(v) for v in own)
        if channels == 1 or len(own) == 1:
            return (sum(own) / len(own),) * channels
        raise InvalidArgument(
            f"{name} must be given: the model has {channels} channels, and its own {name} has "
            f"{len(own)} values"
        )
    if getattr(given, "ndim", 0) == 0 and not isinstance(given, (tuple, list)):
        values = [real(name, given)]
    elif isinstance(given, Iterable):
        values = [real(name, value) for value in given]
    else:
        raise InvalidArgument(f"{name} must be a number, or one per channel, got {given!r:.80}")
    if len(values) == 1:
        values = values * channels
    if len(values) != channels:
        raise InvalidArgument(
            f"{name} must have 1 value or one per channel ({channels}), got {len(values)}"
        )
    return tuple(values)
