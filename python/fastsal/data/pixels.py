"""Decoding of images, and preprocessing of pixels for a model.

Images are preprocessed in two steps. `Fit` and `fit_arrays` make pixels of one size, in 0 to 255;
`Fit` runs in the processes that decode files. `normalize` makes the input of a model of a batch.

Axes: n images, h and w pixels, c channels (1 grayscale, 3 RGB).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.data.places import Place
from fastsal.errors import DataError
from fastsal.models.inputs import OF_BATCHES, InputSpec

if TYPE_CHECKING:
    from PIL.Image import Image

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"

Pixels = npt.NDArray[np.uint8]


def decode(place: Place) -> Image:
    """Read an image file as a Pillow image of mode "L" (grayscale) or "RGB".

    Raises:
        DataError: The file is damaged, is no image, or has more than 8 bits per channel.
    """
    import PIL.Image

    try:
        with place.open("rb") as file, PIL.Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"data: {place} must have 8 bits per channel, got mode {image.mode}"
                )
            is_gray = image.mode in ("1", "L", "LA")
            decoded: Image = image.convert("L" if is_gray else "RGB")
            return decoded
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types
        # Of Pillow's message on what is no image, only the address of an object differs.
        reason = "unknown format" if "cannot identify" in str(error) else str(error)
        raise DataError(f"data: {place} cannot be read as an image ({reason})") from None


def uses_pillow(spec: InputSpec, *, of_files: bool) -> bool:
    """Whether images are resized by Pillow, as in timm, rather than by PyTorch."""
    if spec.size is None:
        return False
    is_cropped = spec.crop_pct is not None and (of_files or spec.crop_arrays)
    return is_cropped or spec.interpolation not in OF_BATCHES


class Fit:
    """Resizes and crops an image by timm's evaluation transform, up to the normalization.

    Args:
        spec: Size, crop and interpolation.
        of_files: Whether the images are files; images in memory may be exempt from the crop.
    """

    def __init__(self, spec: InputSpec, *, of_files: bool) -> None:
        import timm.data

        assert spec.size is not None
        is_cropped = spec.crop_pct is not None and (of_files or spec.crop_arrays)
        self._channels = spec.channels
        self._mode = "RGB" if spec.channels == 3 else "L"
        create: Any = getattr(timm.data, "create_transform")  # noqa: B009 - untyped
        transform = create(
            input_size=(spec.channels, *spec.size),
            interpolation=spec.interpolation,
            mean=spec.mean if spec.channels == 3 else spec.mean[:1],
            std=spec.std if spec.channels == 3 else spec.std[:1],
            crop_pct=spec.crop_pct if is_cropped else 1.0,
            crop_mode=spec.crop_mode if is_cropped else "center",
            use_prefetcher=True,  # without normalization
        )
        # All but the conversion to a tensor, so that new processes do not import timm for it.
        self._steps: list[Callable[[Any], Any]] = list(transform.transforms[:-1])

    def __call__(self, image: Image, what: str) -> Pixels:
        """Return the pixels of an image, uint8 `[c, h, w]`."""
        if image.mode == "RGB" and self._channels not in (1, 3):
            raise _other_channels(what, self._channels, 3)
        image = image if image.mode == self._mode else image.convert(self._mode)
        for step in self._steps:
            image = step(image)
        pixels: Pixels = np.asarray(image)
        if pixels.ndim == 2:
            return np.broadcast_to(pixels, (max(1, self._channels), *pixels.shape))
        chw: Pixels = pixels.transpose(2, 0, 1)
        return chw


def as_image(pixels: Pixels) -> Image:
    """Return pixels `[h, w, 1 or 3]` as a Pillow image."""
    import PIL.Image

    flat = pixels.squeeze(2) if pixels.shape[2] == 1 else pixels
    image: Image = PIL.Image.fromarray(np.ascontiguousarray(flat))
    return image


def fit_arrays(x: Pixels, spec: InputSpec, source: str) -> Tensor:
    """Convert uint8 `[n, h, w, c]` to `[n, spec.channels, *spec.size]`, in 0 to 255."""
    if uses_pillow(spec, of_files=False):
        if x.shape[3] not in (1, 3):
            raise DataError(
                f"crop_pct, crop_mode and interpolation={spec.interpolation!r} require images of 1 "
                f"or 3 channels, got {x.shape[3]} in {source}"
            )
        fit = Fit(spec, of_files=False)
        return torch.from_numpy(np.stack([fit(as_image(each), source) for each in x]))
    writable = np.require(x, requirements=["C", "W"])  # as PyTorch asks for
    images = torch.from_numpy(writable).permute(0, 3, 1, 2).float()
    channels = images.shape[1]
    if channels == 3 and spec.channels == 1:
        images = (images * torch.tensor(LUMINANCE, device="cpu").view(1, 3, 1, 1)).sum(
            1, keepdim=True
        )
    elif channels == 1 and spec.channels > 1:
        images = images.expand(-1, spec.channels, -1, -1)
    elif channels != spec.channels:
        raise _other_channels(source, spec.channels, channels)
    if spec.size is not None and tuple(images.shape[2:]) != spec.size:
        images = _resize(images, spec.size, spec.interpolation)
    return images


def normalize(images: Tensor, spec: InputSpec, *, pin_memory: bool = False) -> Tensor:
    """Normalize images in 0 to 255, `[n, c, h, w]`, to float32 `[n, c, h, w]`.

    Pixels of Pillow, uint8, are divided by 255 first, as in torchvision and timm, so that the
    result is equal to theirs in every bit.

    Args:
        images: uint8 or float32.
        spec: Mean and standard deviation.
        pin_memory: Whether the result is in pinned memory, from which copies to a GPU are faster.
    """
    is_bytes = images.dtype == torch.uint8
    scale = np.float32(1 if is_bytes else 255)
    mean = np.array(spec.mean, np.float32)[:, None, None] * scale
    std = np.array(spec.std, np.float32)[:, None, None] * scale
    out = torch.empty(images.shape, dtype=torch.float32, device="cpu", pin_memory=pin_memory)
    # One image at a time fits the cache of a processor, whose other cores decode meanwhile.
    for source, normal in zip(images.numpy(), out.numpy(), strict=True):
        if is_bytes:
            np.divide(source, np.float32(255), out=normal)
            np.subtract(normal, mean, out=normal)
        else:
            np.subtract(source, mean, out=normal)
        np.divide(normal, std, out=normal)
    return out


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


def _other_channels(what: str, wanted: int, channels: int) -> DataError:
    return DataError(f"x: {what} must have {wanted} channels for this model, got {channels}")


def size_text(size: tuple[int, ...]) -> str:
    """Format a size `(h, w)` for a message."""
    return f"{size[0]}x{size[1]} pixels"
