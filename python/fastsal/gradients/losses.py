"""Per-sample losses, and validation of images, labels and model outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.errors import DataError, InvalidArgument, NonFiniteGradient
from fastsal.gradients.precision import at_least_float32, row_dtype
from fastsal.models.outputs import output_tensor, with_tensors
from fastsal.utils.choices import Curvature

LossFunction = Callable[[Any, Any], Tensor]
# Whether each curvature needs the labels of the batches.
LABEL_USE: dict[Curvature, Literal["required", "optional", "ignored"]] = {
    "empirical": "required",
    "sampled": "optional",
    "features": "ignored",
}

NO_LABELS = "labels must be given, except with curvature='sampled' or 'features'"

# Integers with more axes are treated as pixels that were not normalized.
_TOKEN_AXES = 3


def resolve_loss(loss: str | LossFunction) -> LossFunction:
    """Return the function `(outputs, labels) -> [n]` of a `loss` argument."""
    if callable(loss):
        return loss
    if loss != "cross-entropy":
        raise InvalidArgument(
            f"loss must be 'cross-entropy' or a function (outputs, labels) -> [n], got {loss!r:.80}"
        )
    return cross_entropy


def in_float32(loss: LossFunction, device: torch.device) -> LossFunction:
    """Wrap a loss so that it is computed in float32 or wider, outside of autocast.

    Tensors in the outputs of the model are converted if they are of a narrower type.
    """

    def widened(x: Tensor) -> Tensor:
        return at_least_float32(x) if x.is_floating_point() else x

    def computed(outputs: Any, labels: Any) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return loss(with_tensors(outputs, widened), labels)

    return computed


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each sample, `[n]`, in float32 or wider.

    Labels may be of any type of integers; PyTorch takes int64 and uint8 only.
    """
    targets = labels if labels.is_floating_point() else labels.long()
    return F.cross_entropy(at_least_float32(output_tensor(outputs)), targets, reduction="none")


def feature_matching(outputs: Tensor, noise: Tensor) -> Tensor:
    """Return the loss of each sample under the Gaussian model of its features, `[n]`.

    The loss is `½ ‖f_θ − y‖² / F` with the target `y = f + √F ε`, see `GradientEngine`. Terms are
    divided by `√F` before the difference, so that `f_θ` and `f` cancel exactly.

    Args:
        outputs: Features `f_θ`, `[n, F]`, at the weights that define the targets.
        noise: Standard normal `ε`, `[n, F]`.
    """
    f = at_least_float32(outputs)
    return ((f - f.detach()) / math.sqrt(f.shape[1]) - noise).square().sum(dim=1) / 2


def check_autocast(autocast: torch.dtype | None) -> None:
    """Raise InvalidArgument unless `autocast` is None or a 16-bit floating-point dtype."""
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise InvalidArgument(
            f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}"
        )


def check_images(images: Any) -> None:
    """Raise DataError unless `images` are normalized floating-point images or token ids.

    Integers with up to three axes are token ids.
    """
    if not isinstance(images, Tensor):
        raise DataError(
            f"images must be a tensor, images [n, C, H, W] or token ids [n, L], got "
            f"{type(images).__name__}"
        )
    is_tokens = images.dtype in (torch.int64, torch.int32) and images.dim() <= _TOKEN_AXES
    if not images.is_floating_point() and not is_tokens:
        raise DataError(
            f"images must be normalized floating point [n, C, H, W], or token ids [n, L] in int64 "
            f"or int32, got {images.dtype} of shape {list(images.shape)}; scale and normalize "
            "images as the model expects"
        )
    if images.dim() < (1 if is_tokens else 2):
        raise DataError(
            f"images must be [n, C, H, W], or token ids [n, L], got shape {list(images.shape)}"
        )
    if images.shape[0] == 0:
        raise DataError("images must contain at least one sample, got none")


def check_labels(labels: Any, n: int) -> None:
    """Raise DataError unless `labels` is a tensor with one label per sample."""
    if labels is None:
        raise DataError(NO_LABELS)
    if not isinstance(labels, Tensor):
        raise DataError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dim() == 0 or labels.shape[0] != n:
        raise DataError(f"labels must be [{n}], one label per sample, got {list(labels.shape)}")


def check_classes(labels: Tensor, classes: int | None, offset: int) -> None:
    """Raise DataError unless `labels` are integers `[n]` in [0, classes); None for no bound."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"labels must be integers, got {labels.dtype}")
    if labels.dim() != 1:
        raise DataError(
            f"labels must be class indices [n], got shape {list(labels.shape)}; for other labels "
            "pass loss=, a function (outputs, labels) -> [n]"
        )
    wrong = labels < 0 if classes is None else (labels < 0) | (labels >= classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        valid = "at least 0" if classes is None else f"in [0, {classes - 1}] for this model"
        raise DataError(
            f"labels must be {valid}, got {int(labels[first])} for sample {offset + first}"
        )


def check_logits(outputs: Any, n: int, why: str) -> int:
    """Return C of the logits `[n, C]` in the outputs; raise InvalidArgument if there are none."""
    outputs = output_tensor(outputs, what=f"logits [n, C] for {why}")
    if outputs.dim() != 2 or outputs.shape[0] != n:
        raise InvalidArgument(
            f"model must return logits [{n}, C] for {why}, got {list(outputs.shape)}; for another "
            "shape, such as [n, L, V], pass loss=, a function (outputs, labels) -> [n]"
        )
    return int(outputs.shape[1])


def check_losses(losses: Any, n: int) -> None:
    """Raise InvalidArgument unless a loss function returned floating-point losses `[n]`."""
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (n,):
        came = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InvalidArgument(
            f"loss must return one loss per sample, [{n}] (reduction='none'), got {came}"
        )
    if not losses.is_floating_point():
        raise InvalidArgument(f"loss must return floating point, got {losses.dtype}")


def check_finite(losses: Tensor, offset: int) -> None:
    """Raise NonFiniteGradient for the first sample whose loss is NaN or infinite."""
    wrong = ~torch.isfinite(losses.detach())
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise NonFiniteGradient(
            f"sample {offset + first}: the loss must be finite, got "
            f"{float(losses.detach()[first])}; check this image and the model's precision"
        )


def sample_labels(outputs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a label per sample from the softmax of the logits, by inversion of `uniforms` `[n]`."""
    # On the CPU in float64, so that labels do not depend on the device.
    cumulative = outputs.detach().cpu().to(torch.float64).softmax(dim=1).cumsum(dim=1)
    drawn = (cumulative <= uniforms.unsqueeze(1)).sum(dim=1)
    return drawn.clamp_(max=outputs.shape[1] - 1).to(outputs.device)


def draw_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw uniform numbers in [0, 1), float64, on the CPU whatever the default device is."""
    return torch.rand(tuple(shape), dtype=torch.float64, generator=generator, device="cpu")


def draw_noise(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers with the shape of `outputs`, by inversion of uniform ones.

    The uniform numbers are drawn sample by sample on the CPU, so that the noise of a sample depends
    neither on the batch size (as with `torch.randn`) nor on the device.
    """
    uniforms = draw_uniform(outputs.shape, generator)
    # The generator may return 0, whose inverse is infinite.
    noise: Tensor = torch.special.ndtri(uniforms.clamp_(min=2.0**-54))
    # In two steps: the device may lack float64.
    return noise.to(row_dtype(outputs)).to(outputs.device)
