"""Decoding of image files, and preprocessing of pixels for a model.

Axes: n images, h and w pixels, c channels (1 grayscale, 3 RGB).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.errors import DataError
from fastsal.models.inputs import InputSpec

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"


def decode(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image file as uint8 `[h, w, 1]` (grayscale) or `[h, w, 3]` (RGB)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"data: {path} must have 8 bits per channel, got mode {image.mode}")
            is_gray = image.mode in ("1", "L", "LA")
            pixels = np.array(image.convert("L" if is_gray else "RGB"), np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data: {path} cannot be read as an image ({error})") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def prepare(x: npt.NDArray[np.uint8], spec: InputSpec, source: str) -> Tensor:
    """Convert uint8 `[n, h, w, c]` to normalized float32 `[n, spec.channels, *spec.size]`."""
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float()
    channels = images.shape[1]
    if channels == 3 and spec.channels == 1:
        images = (images * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif channels == 1 and spec.channels > 1:
        images = images.expand(-1, spec.channels, -1, -1)
    elif channels != spec.channels:
        raise DataError(
            f"x: {source} must have {spec.channels} channels for this model, got {channels}"
        )
    if spec.size is not None and tuple(images.shape[2:]) != spec.size:
        images = _resize(images, spec.size, spec.interpolation)
    mean = torch.tensor(spec.mean).view(1, -1, 1, 1) * 255
    std = torch.tensor(spec.std).view(1, -1, 1, 1) * 255
    return ((images - mean) / std).contiguous()


def _resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize `[n, c, h, w]` so that it covers `size`, then crop the center."""
    height, width = images.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    fitted = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if interpolation == "nearest":
        images = F.interpolate(images, fitted, mode="nearest-exact")
    else:
        images = F.interpolate(
            images, fitted, mode=interpolation, align_corners=False, antialias=True
        ).clamp_(0, 255)
    top, left = (fitted[0] - size[0]) // 2, (fitted[1] - size[1]) // 2
    return images[:, :, top : top + size[0], left : left + size[1]]


def size_text(size: tuple[int, ...]) -> str:
    """Format a size `(h, w)` for a message."""
    return f"{size[0]}x{size[1]} pixels"
