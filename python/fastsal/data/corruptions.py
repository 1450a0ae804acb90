"""Corrupted images: noise, blur, compression, brightness and contrast, in five severities.

As the benchmarks of Hendrycks & Dietterich (2019, ICLR) do it, with the parameters of their public
code: those of CIFAR-10-C for images of up to 64 pixels on the shorter side, those of ImageNet-C for
larger ones. An image is corrupted as it is stored, before it is fitted to a model (ImageNet-C cuts
it to 224 pixels first). Pixels count from 0 to 1 here, and are rounded to 8 bits in the end.

| kind | what is done | CIFAR-10-C, severity 1 to 5 | ImageNet-C |
|---|---|---|---|
| `gaussian-noise` | `x + σ ε`, `ε ~ N(0, 1)`; σ | .04 .06 .08 .09 .10 | .08 .12 .18 .26 .38 |
| `blur` | a Gaussian over pixels, edges repeated; its σ | .4 .6 .7 .8 1 | 1 2 3 4 6 |
| `jpeg` | through a JPEG file; its quality | 80 65 58 50 40 | 25 18 15 10 7 |
| `brightness` | HSV's value plus b | .05 .1 .15 .2 .3 | .1 .2 .3 .4 .5 |
| `contrast` | `c (x − x̄) + x̄`, x̄ of each channel; c | .75 .5 .4 .3 .15 | .4 .3 .2 .1 .05 |

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
from fastsal.errors import DataError, InvalidArgument

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

# Parameter by severity: of small images, of large ones.
_PARAMETERS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gaussian-noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
}
KINDS = tuple(_PARAMETERS)
_SMALL = 64  # pixels of the shorter side, up to which an image is small
_REACH = 4  # standard deviations that a blur reaches


def corrupt(images: ImageSet, kind: str, severity: int = 3, seed: int = 0) -> ImageSet:
    """Corrupt every image.

    What an image becomes depends on itself, its `index` in its source and the arguments, not on the
    other images, so that subsets can be taken before or after.

    Args:
        images: in memory, or of files, which are corrupted each time that they are read.
        kind: one of `KINDS`, see the table of this module.
        severity: 1 to 5.
        seed: of the noise.

    Returns:
        Images of the same size, labels, source and index.

    Raises:
        InvalidArgument: `kind` or `severity` is not taken.
        DataError: `jpeg` or `brightness` of images that are neither grey nor RGB; of files, when
            they are read.
    """
    if kind not in _PARAMETERS:
        raise InvalidArgument(f"kind: got {kind!r}; takes one of {', '.join(KINDS)}")
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= 5:
        raise InvalidArgument(f"severity: got {severity!r}; takes 1 to 5")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InvalidArgument(f"seed: got {seed!r}; takes an integer, 0 or more")
    return images.transformed(Corruption(kind, severity, seed))


@dataclass(frozen=True)
class Corruption:
    """A corruption as a transform of an `ImageSet`; see `corrupt`."""

    kind: str
    severity: int
    seed: int = 0

    def __call__(self, pixels: Pixels, index: int) -> Pixels:
        """Corrupt pixels uint8 `[h, w, c]` of the image at `index` of its source."""
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
    """Filter by a Gaussian along both axes; pixels at the edges are repeated."""
    reach = int(_REACH * sigma + 0.5)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights /= weights.sum()
    y = torch.from_numpy(x).permute(2, 0, 1)[:, None]  # [c, 1, h, w]
    y = F.pad(y, (reach, reach, reach, reach), mode="replicate")
    y = F.conv2d(F.conv2d(y, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    blurred: Floats = y[:, 0].permute(1, 2, 0).numpy()
    return blurred


def _brightened(x: Floats, more: float) -> Floats:
    """Add to the value of HSV, at most to 1: colours are scaled, as hue and saturation stay."""
    _check_channels(x.shape[2], "brightness")
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + more, 1)
    # Black has no hue: it becomes grey.
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
        raise DataError(f"x: has {channels} channels; {kind!r} takes grey or RGB images")
