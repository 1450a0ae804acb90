"""Input images of a model: size, channels and normalization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.models.wrappers import unwrapped
from fastsal.utils.choices import CROP_MODES, INTERPOLATIONS, CropMode, Interpolation
from fastsal.utils.numbers import as_integer, real, whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# timm's default for models that name no other.
DEFAULT_CROP_PCT = 0.875
# Interpolations that PyTorch has for batches; Pillow has all.
OF_BATCHES = ("bicubic", "bilinear", "nearest")


@dataclass(frozen=True)
class InputSpec:
    """Input of a model: images `[n, channels, *size]`, normalized by `mean` and `std`.

    Image files are preprocessed by timm's evaluation transform if `crop_pct` is a number, so that
    published accuracies are reproduced. Images in memory are usually small and already cut: they
    are resized to cover `size` and center-cropped, unless `crop_arrays` is true.

    Attributes:
        channels: Number of channels, 1 for grayscale, 3 for RGB.
        size: `(height, width)` in pixels; None keeps the size of the images.
        mean: Per-channel mean for pixels in [0, 1].
        std: Per-channel standard deviation for pixels in [0, 1].
        interpolation: Interpolation for resizing, as timm names it: "bicubic", "bilinear",
            "nearest", "box", "hamming" or "lanczos".
        crop_pct: Input size divided by the size to which images are resized before the crop, in
            (0, 1]; None resizes images to cover `size` and crops what is left over.
        crop_mode: How images of another shape are cropped, as timm names it: "center" (resize the
            shorter side, cut the longer one), "squash" (resize without the aspect ratio) or
            "border" (resize the longer side, pad the shorter one).
        crop_arrays: Whether `crop_pct` and `crop_mode` apply to images in memory too.
    """

    channels: int
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    crop_pct: float | None = None
    crop_mode: CropMode = "center"
    crop_arrays: bool = False


def input_spec(
    model: nn.Module,
    *,
    channels: int | None = None,
    size: int | tuple[int, int] | Literal["native", "train", "test"] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    crop_pct: float | None = None,
    crop_mode: CropMode | None = None,
    interpolation: Interpolation | None = None,
) -> InputSpec:
    """Return the size, channels, crop and normalization of the images that `model` expects.

    All are read from `pretrained_cfg` or `default_cfg`, as timm's models have it. The defaults for
    other models are the mean and std of ImageNet, and images of their own size without a crop.

    Args:
        model: Any module, or a wrapper of it.
        channels: Number of channels; None reads it from the first convolution.
        size: Size in pixels: one number, `(height, width)`, "native" to keep that of the images,
            or "test" for the size at which timm evaluates the model, where it differs from that of
            training ("train", the default); its crop is then used, too.
        mean: Per-channel mean for pixels in [0, 1], or one value for all channels.
        std: Per-channel standard deviation for pixels in [0, 1], or one value for all channels.
        crop_pct: Input size divided by the size to which images are resized before the crop, in
            (0, 1]. If it or `crop_mode` is given, images in memory are cropped too.
        crop_mode: "center", "squash" or "border", see `InputSpec`.
        interpolation: Interpolation for resizing, see `InputSpec`.

    Raises:
        InvalidArgument: A value is out of range, `size` differs from the only size that the model
            supports, or there is a crop but no size.
    """
    model = unwrapped(model)
    own = _own_config(model, use_test_size=isinstance(size, str) and size == "test")
    own_size, fixed = own.size, own.fixed
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
        mean=_per_channel("mean", mean, own.mean, channels),
        std=_per_channel("std", std, own.std, channels),
        **_crop(own, chosen, crop_pct, crop_mode, interpolation),
    )
    if min(spec.std) <= 0:
        raise InvalidArgument(f"std must be positive, got {min(spec.std)}")
    return spec


def example_images(model: nn.Module) -> Tensor:
    """Return two random images `[2, C, H, W]` as a model expects them, of 224 pixels by default."""
    spec = input_spec(model, mean=0.0, std=1.0)  # values that every number of channels has
    height, width = spec.size or (224, 224)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        (2, spec.channels, height, width),
        generator=generator,
        dtype=torch.float32,
        device="cpu",
    )


@dataclass(frozen=True)
class _Config:
    """What a model says about its images; `fixed` is whether it supports no other size."""

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop_pct: float | None = None
    crop_mode: CropMode = "center"
    fixed: bool = False


def _own_config(model: nn.Module, *, use_test_size: bool = False) -> _Config:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not config:
        return _Config()
    import timm.data

    resolve: Any = getattr(timm.data, "resolve_model_data_config")  # noqa: B009 - untyped
    own = getattr(model, "pretrained_cfg", None)
    named = {} if own else {"pretrained_cfg": dict(config)}
    resolved = resolve(model, use_test_size=use_test_size, **named)
    height, width = resolved["input_size"][-2:]
    get = config.get if hasattr(config, "get") else lambda key: getattr(config, key, None)
    fixed = bool(get("fixed_input_size")) and not getattr(model, "dynamic_img_size", False)
    patches = getattr(model, "patch_embed", None)
    built = getattr(patches, "img_size", None)
    if fixed and isinstance(built, tuple) and len(built) == 2:
        height, width = built
    found, mode = resolved["interpolation"], resolved["crop_mode"]
    return _Config(
        (int(height), int(width)),
        tuple(resolved["mean"]),
        tuple(resolved["std"]),
        found if found in INTERPOLATIONS else "bicubic",
        float(resolved["crop_pct"]),
        mode if mode in CROP_MODES else "center",  # as in timm
        fixed,
    )


def _crop(
    own: _Config,
    size: tuple[int, int] | None,
    crop_pct: float | None,
    crop_mode: CropMode | None,
    interpolation: Interpolation | None,
) -> dict[str, Any]:
    """Return the fields of an `InputSpec` on how images are resized and cropped."""
    for name, value, kinds in (
        ("crop_mode", crop_mode, CROP_MODES),
        ("interpolation", interpolation, INTERPOLATIONS),
    ):
        if value is not None and value not in kinds:
            raise InvalidArgument(f"{name} must be one of {', '.join(kinds)}, got {value!r:.80}")
    is_given = crop_pct is not None or crop_mode is not None
    if crop_pct is not None:
        crop_pct = real("crop_pct", crop_pct, above=0, most=1)
    if size is None:
        if is_given:
            name = "crop_mode" if crop_pct is None else "crop_pct"
            raise InvalidArgument(f"{name} must be None without a size of the images; pass size")
        return {"interpolation": interpolation or own.interpolation}
    if crop_pct is None:
        crop_pct = own.crop_pct
        if crop_pct is None and crop_mode is not None:
            crop_pct = DEFAULT_CROP_PCT
    return {
        "interpolation": interpolation or own.interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode or own.crop_mode,
        "crop_arrays": is_given,
    }


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module.in_channels
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size") if isinstance(config, dict) else None
    return int(shape[0]) if shape else 3


def _parse_size(size: object, own: tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None or (isinstance(size, str) and size in ("train", "test")):
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
            "size must be pixels, (height, width), 'native', 'train', 'test' or None, got "
            f"{size!r:.80}"
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
