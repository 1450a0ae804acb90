"""Corrupted images: noise, blur, compression, brightness and contrast, at five severities.

Corruptions and parameters are those of the public code of Hendrycks & Dietterich (2019),
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR: those of
CIFAR-10-C for images of up to 64 pixels on the shorter side, those of ImageNet-C for larger ones.
Images are corrupted at their stored size, before resizing and cropping (ImageNet-C crops to 224
pixels first). Pixels are in [0, 1] below, and are rounded to 8 bits at the end.

| kind | formula and parameter | CIFAR-10-C, severity 1 to 5 | ImageNet-C |
|---|---|---|---|
| `gaussian-noise` | `x + σ ε`, `ε ~ N(0, 1)`; σ | .04 .06 .08 .09 .10 | .08 .12 .18 .26 .38 |
| `blur` | Gaussian filter, edges replicated; σ in pixels | .4 .6 .7 .8 1 | 1 2 3 4 6 |
| `jpeg` | JPEG compression; quality | 80 65 58 50 40 | 25 18 15 10 7 |
| `brightness` | value of HSV `+ b`; b | .05 .1 .15 .2 .3 | .1 .2 .3 .4 .5 |
| `contrast` | `c (x − x̄) + x̄`, x̄ per channel; c | .75 .5 .4 .3 .15 | .4 .3 .2 .1 .05 |

Axes: h and w pixels, c channels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError
from fastsal.utils.choices import CORRUPTION_KINDS, CorruptionKind
from fastsal.utils.numbers import whole
from fastsal.utils.suggestions import check_choice

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

# Parameters by severity, of small and of large images.
_PARAMETERS: dict[CorruptionKind, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gaussian-noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
}
_SMALL = 64  # largest shorter side of a small image, in pixels
_REACH = 4  # radius of the Gaussian filter, in standard deviations


def corrupt(images: ImageSet, kind: CorruptionKind, severity: int = 3, seed: int = 0) -> ImageSet:
    """Corrupt every image, as in CIFAR-10-C and ImageNet-C (Hendrycks & Dietterich, 2019).

    A corrupted image depends on the image, its `index` in its source and the arguments only, so
    that corrupting a subset equals taking the subset of the corrupted images.

    Args:
        images: Images in memory, or files, which are corrupted each time they are read.
        kind: "gaussian-noise", "blur", "jpeg", "brightness" or "contrast"; see the table in
            `fastsal.data.corruptions`.
        severity: 1 to 5.
        seed: Seed of the noise.

    Returns:
        Images of the same size, labels, source and index.

    Raises:
        InvalidArgument: `kind`, `severity` or `seed` is invalid.
        DataError: Images for "jpeg" or "brightness" are neither grayscale nor RGB; for files,
            raised when they are read.
    """
    check_choice("kind", kind, CORRUPTION_KINDS)
    return images.transformed(
        Corruption(kind, whole("severity", severity, 1, 5), whole("seed", seed))
    )


@dataclass(frozen=True)
class Corruption:
    """A corruption as a transform of an `ImageSet`, see `corrupt`."""

    kind: CorruptionKind
    severity: int
    seed: int = 0

    def __call__(self, pixels: Pixels, index: int) -> Pixels:
        """Corrupt pixels, uint8 `[h, w, c]`, of the image with this `index` in its source."""
        is_large = min(pixels.shape[:2]) > _SMALL
        parameter = _PARAMETERS[self.kind][is_large][self.severity - 1]
        if self.kind == "jpeg":
            return _through_jpeg(pixels, int(parameter))
        x = pixels / 255
        if self.kind == "gaussian-noise":
            x += parameter * np.random.default_rng([self.seed, index]).normal(size=x.shape)
        elif self.kind == "blur":
            x = _blurred(x, parameter)
        elif self.kind == "brightness":
            x = _brightened(x, parameter)
        else:
            mean = x.mean(axis=(0, 1))
            x = parameter * (x - mean) + mean
        corrupted: Pixels = (np.clip(x, 0, 1) * 255).round().astype(np.uint8)
        return corrupted


def _blurred(x: Floats, sigma: float) -> Floats:
    """Apply a Gaussian filter along both axes; edge pixels are replicated."""
    reach = int(_REACH * sigma + 0.5)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64, device="cpu")
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights /= weights.sum()
    y = torch.from_numpy(x).permute(2, 0, 1)[:, None]  # [c, 1, h, w]
    y = F.pad(y, (reach, reach, reach, reach), mode="replicate")
    y = F.conv2d(F.conv2d(y, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    blurred: Floats = y[:, 0].permute(1, 2, 0).numpy()
    return blurred


def _brightened(x: Floats, more: float) -> Floats:
    """Increase the value of HSV, up to 1, by scaling: hue and saturation do not change."""
    _check_channels(x.shape[2], "brightness")
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + more, 1)
    # Black has no hue and becomes gray.
    changed: Floats = np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)
    return changed


def _through_jpeg(pixels: Pixels, quality: int) -> Pixels:
    from PIL import Image

    _check_channels(pixels.shape[2], "jpeg")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    found = np.array(Image.open(file), np.uint8)
    return found.reshape(pixels.shape)


def _check_channels(channels: int, kind: str) -> None:
    if channels not in (1, 3):
        raise DataError(f"x must have 1 or 3 channels for {kind!r}, got {channels}")
