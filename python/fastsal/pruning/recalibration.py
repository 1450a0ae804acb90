"""Batch normalisation after pruning: running means and variances as they are now.

It may help or hurt. On a compensated CIFAR ResNet-20 it lowered accuracy at moderate sparsities and
raised it at extreme ones: compensation aims at the outputs under the old moments. Measure, as
`prune(recalibrate=True)` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.models.evaluating import evaluating, to_model

# What keeps running moments, and is evaluated with them.
_Normalisation = nn.modules.batchnorm._BatchNorm


def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Any]]) -> int:
    """Average the moments of every batch normalisation over images, in place.

    Args:
        model: In any mode; it is in evaluation mode but for these layers, and its modes are
            restored.
        batches: Pairs of images `[n, ...]` and anything; large batches estimate variances better.

    Returns:
        The number of layers that were recalibrated.
    """
    layers = tracked(model)
    if not layers:
        return 0
    first = next(model.parameters())
    with _training_only(model, layers), torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()
        for images, _ in batches:
            model(to_model(images, first))
    return len(layers)


def recalibrate_if_better(
    model: nn.Module, batches: Iterable[tuple[Tensor, Any]], loss: Callable[[], float]
) -> dict[str, Any] | None:
    """Recalibrate, and take it back unless `loss` is lower for it.

    Returns:
        `before`, `after` and whether it was `kept`; None for a model without such layers.
    """
    layers = tracked(model)
    if not layers:
        return None
    moments = [{k: v.clone() for k, v in layer.named_buffers()} for layer in layers]
    before = loss()
    recalibrate(model, batches)
    after = loss()
    kept = after < before  # False for NaN
    if not kept:
        with torch.no_grad():
            for layer, saved in zip(layers, moments, strict=True):
                for name, buffer in layer.named_buffers():
                    buffer.copy_(saved[name])
    return {"before": before, "after": after, "kept": kept}


def tracked(model: nn.Module) -> list[_Normalisation]:
    """Return the layers that keep running moments."""
    return [
        m for m in model.modules() if isinstance(m, _Normalisation) and m.running_mean is not None
    ]


@contextlib.contextmanager
def _training_only(model: nn.Module, layers: list[_Normalisation]) -> Iterator[None]:
    momenta = [layer.momentum for layer in layers]
    with evaluating(model):
        try:
            for layer in layers:
                layer.training = True
                layer.momentum = None  # the average over all batches
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
