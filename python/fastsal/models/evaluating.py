"""Run a model in evaluation mode and leave it as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put every module in evaluation mode; give each its own mode back after.

    Yields:
        The device of the model's first parameter.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        for module, mode in modes.items():
            module.training = mode


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """What a model puts out in evaluation mode; its modes are restored."""
    return in_evaluation(model, images, lambda model, images: model(images))


def in_evaluation(
    model: nn.Module, images: Tensor, call: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """What `call(model, images)` returns in evaluation mode, float32; its modes are restored."""
    first = next(model.parameters())
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return call(model, to_model(images, first)).float()
    finally:
        for module, mode in modes:
            module.training = mode


def to_model(images: Tensor, parameter: Tensor) -> Tensor:
    """Move images to a parameter's device and type; integers, which are tokens, stay integers."""
    if not images.is_floating_point():
        return images.to(parameter.device)
    return images.to(parameter.device, parameter.dtype)
