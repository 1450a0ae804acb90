"""Per-sample losses, and the checks of images, labels and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.errors import DataError, InvalidArgument, NonFiniteGradient
from fastsal.gradients.precision import at_least_float32, row_dtype
from fastsal.utils.choices import Curvature

LossFunction = Callable[[Any, Any], Tensor]
# What becomes of the labels that batches bring.
LABEL_USE: dict[Curvature, Literal["required", "optional", "ignored"]] = {
    "empirical": "required",
    "sampled": "optional",
    "features": "ignored",
}

# Integers of more axes are taken for pixels that were not normalised.
_TOKEN_AXES = 3


def resolve_loss(loss: str | LossFunction) -> LossFunction:
    """Return the function `(outputs, labels) -> [n]` that a `loss` argument stands for."""
    if callable(loss):
        return loss
    if loss != "cross-entropy":
        raise InvalidArgument(
            f"loss: takes 'cross-entropy' or a function (outputs, labels) -> [n], got {loss!r}"
        )
    return cross_entropy


def in_float32(loss: LossFunction, device: torch.device) -> LossFunction:
    """Return a loss that is computed in float32 at least, whatever the model runs in.

    Outputs that are a tensor are converted; those of another kind are the loss function's affair.
    """

    def computed(outputs: Any, labels: Any) -> Tensor:
        if isinstance(outputs, Tensor) and outputs.is_floating_point():
            outputs = at_least_float32(outputs)
        with torch.autocast(device.type, enabled=False):
            return loss(outputs, labels)

    return computed


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, in float32 at least."""
    return F.cross_entropy(at_least_float32(outputs), labels, reduction="none")


def feature_matching(outputs: Tensor, noise: Tensor) -> Tensor:
    """Loss of each sample under the Gaussian model of its features, see `GradientEngine`.

    `½ ‖f_θ − y‖² / F` with the target `y = f + √F ε`; both are divided by `√F` here, so that `f_θ`
    and `f` cancel exactly.

    Args:
        outputs: `f_θ` `[n, F]`, at the weights that targets are drawn from.
        noise: `ε` `[n, F]`.
    """
    f = at_least_float32(outputs)
    return ((f - f.detach()) / math.sqrt(f.shape[1]) - noise).square().sum(dim=1) / 2


def check_autocast(autocast: torch.dtype | None) -> None:
    """Refuse types that passes are not run in."""
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise InvalidArgument(
            f"autocast: takes torch.bfloat16, torch.float16 or None, got {autocast}"
        )


def check_images(images: Any) -> None:
    """Refuse what would be misread rather than fail: pixels in integers, say.

    Integers of up to three axes are tokens.
    """
    if not isinstance(images, Tensor):
        raise DataError(
            f"images: takes a tensor, images [n, C, H, W] or tokens [n, L], got "
            f"{type(images).__name__}"
        )
    is_tokens = images.dtype in (torch.int64, torch.int32) and images.dim() <= _TOKEN_AXES
    if not images.is_floating_point() and not is_tokens:
        raise DataError(
            f"images: takes normalised floating point [n, C, H, W], or tokens [n, L] in int64 or "
            f"int32, got {images.dtype} of shape {list(images.shape)}; scale and normalise images "
            "as the model expects"
        )
    if images.dim() < (1 if is_tokens else 2):
        raise DataError(
            f"images: takes [n, C, H, W], or tokens [n, L], got shape {list(images.shape)}"
        )
    if images.shape[0] == 0:
        raise DataError("images: the batch is empty")


def check_labels(labels: Any, n: int) -> None:
    """Check what can be known before the model has run."""
    if labels is None:
        raise DataError("labels: None is taken only with curvature='sampled' or 'features'")
    if not isinstance(labels, Tensor):
        raise DataError(f"labels: takes a tensor, got {type(labels).__name__}")
    if labels.dim() == 0 or labels.shape[0] != n:
        raise DataError(f"labels: takes {n} labels, one an image, got {list(labels.shape)}")


def check_classes(labels: Tensor, classes: int | None, offset: int) -> None:
    """Check class indices: integers `[n]` in `[0, classes)`; None leaves the upper end open."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"labels: takes integers, got {labels.dtype}")
    if labels.dim() != 1:
        raise DataError(
            f"labels: takes [n] class indices, got shape {list(labels.shape)}; for labels of "
            "another shape give loss=, a function (outputs, labels) -> [n]"
        )
    wrong = labels < 0 if classes is None else (labels < 0) | (labels >= classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        has = "labels start at 0" if classes is None else f"the model has {classes} classes"
        raise DataError(f"labels: sample {offset + first} has {int(labels[first])}, {has}")


def check_logits(outputs: Any, n: int, why: str) -> int:
    """Check that the outputs are logits `[n, C]`; return C."""
    if not isinstance(outputs, Tensor):
        raise InvalidArgument(
            f"model: {why} takes logits [n, C], the model returns {type(outputs).__name__}; "
            "pass a wrapper that returns the logits, or a loss function that takes this output"
        )
    if outputs.dim() != 2 or outputs.shape[0] != n:
        raise InvalidArgument(
            f"model: {why} takes logits [{n}, C], the model returns {list(outputs.shape)}; "
            "for another shape, [n, L, V] say, give loss=, a function (outputs, labels) -> [n]"
        )
    return int(outputs.shape[1])


def check_losses(losses: Any, n: int) -> None:
    """Check what a loss function returned."""
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (n,):
        came = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InvalidArgument(
            f"loss: must return one loss a sample, shape [{n}] (reduction='none'), got {came}"
        )
    if not losses.is_floating_point():
        raise InvalidArgument(f"loss: must return floating point, got {losses.dtype}")


def check_finite(losses: Tensor, offset: int) -> None:
    """Raise for the first sample whose loss is NaN or infinite."""
    wrong = ~torch.isfinite(losses.detach())
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise NonFiniteGradient(
            f"sample {offset + first}: its loss is {float(losses.detach()[first])}; "
            "look at this image and at the model's precision"
        )


def sample_labels(outputs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one label a sample from the softmax of the logits, by inversion of `uniforms` [n]."""
    # On the CPU in float64, so that a seed means the same labels on every device.
    cumulative = outputs.detach().to("cpu", torch.float64).softmax(dim=1).cumsum(dim=1)
    drawn = (cumulative <= uniforms.unsqueeze(1)).sum(dim=1)
    return drawn.clamp_(max=outputs.shape[1] - 1).to(outputs.device)


def draw_noise(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers like `outputs` `[n, F]`, by inversion of uniform ones.

    Those are drawn one after the other, sample by sample, so that what a sample gets does not
    depend on how samples are cut into batches (it would by `torch.randn`), nor on the device.
    """
    uniforms = torch.rand(outputs.shape, dtype=torch.float64, generator=generator)
    # The generator may give 0, whose inverse is infinite.
    noise: Tensor = torch.special.ndtri(uniforms.clamp_(min=2.0**-54))
    return noise.to(outputs.device, row_dtype(outputs))
