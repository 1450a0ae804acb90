"""Run a model in evaluation mode and restore its modes afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.models.outputs import with_tensors


@contextlib.contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put every module in evaluation mode for the block, then restore its training flag.

    The flags are set directly: `eval()` and `train()` of a model may do more than set them.

    Yields:
        The device of the model's first parameter.
    """
    with modes_restored(model):
        for module in model.modules():
            module.training = False
        yield next((p.device for p in model.parameters()), torch.device("cpu"))


def plain_call(model: nn.Module, images: Tensor) -> Any:
    """Return `model(images)`."""
    return model(images)


def outputs(
    model: nn.Module, images: Tensor, call: Callable[[nn.Module, Tensor], Any] = plain_call
) -> Any:
    """Return what a model returns in evaluation mode, with tensors in float32, without gradients.

    `outputs.output_tensor` finds the logits in it.

    Args:
        model: Any module with parameters; its modes are restored.
        images: `[n, ...]`, moved to the model's device and type; or token ids.
        call: Runs the model; `features.feature_outputs` returns its features.
    """
    first = next(model.parameters())
    with evaluating(model), torch.no_grad():
        found = call(model, to_model(images, first))
    return with_tensors(found, lambda x: x.float() if x.is_floating_point() else x)


def to_model(images: Tensor, parameter: Tensor) -> Tensor:
    """Move images to the device and type of a parameter; integer token ids keep their type."""
    if not images.is_floating_point():
        return images.to(parameter.device)
    return images.to(parameter.device, parameter.dtype)
