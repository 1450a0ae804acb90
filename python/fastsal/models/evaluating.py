"""Run a model in evaluation mode and restore its modes afterwards.

Modes are changed by the flags `training`, never by `train()` and `eval()`: these may do more than
set flags. Adapter layers, for example, merge their weights in `eval()` and unmerge them in
`train()`, which would change weights, and masks would then apply to others.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastsal.models.outputs import with_tensors
from fastsal.utils.interrupts import uninterrupted

# Layers that images or features of them enter.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextlib.contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with uninterrupted():
            for module, mode in modes:
                _set_mode(module, mode)


def set_modes(model: nn.Module, training: bool) -> None:
    """Set the training flag of every module, without calling `train()` or `eval()`."""
    for module in model.modules():
        _set_mode(module, training)


def _set_mode(module: nn.Module, training: bool) -> None:
    if training and not module.training:
        _drop_kept(module)
    module.training = training


def drop_kept(model: nn.Module) -> None:
    """Drop values of the present weights that evaluation has kept, as `train()` would.

    Such as the attention biases of timm's LeViT. After a pass with gradients they have its graph.
    """
    for module in model.modules():
        _drop_kept(module)


def _drop_kept(module: nn.Module) -> None:
    for name, value in vars(module).items():
        if name.endswith("_cache") and isinstance(value, dict):
            value.clear()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put every module in evaluation mode for the block, then restore its training flag.

    An autocast of the caller is disabled in the block.

    Yields:
        The device of the model's first parameter.
    """
    with modes_restored(model), without_autocast():
        set_modes(model, False)
        yield next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Disable a `torch.autocast` of the caller, so that types are those of the model.

    Passes in mixed precision are asked for by an argument, and enable it inside of the block.
    """
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Enable gradients, also under `no_grad` and `inference_mode`, and run models eagerly.

    An autocast of the caller is disabled.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_autocast())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # only then can anything be compiled
            # The calls inside a compiled graph cannot be intercepted.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


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
    with evaluating(model), torch.no_grad():
        found = call(model, to_model(images, model))
    return with_tensors(found, lambda x: x.float() if x.is_floating_point() else x)


def first_layer_parameter(model: nn.Module) -> Tensor:
    """Return the parameter whose device and type the images of a model should have.

    Parts of a model may have other types, such as a classifier in float32 after a backbone in
    bfloat16: it is that of the first layer with weights, or else the first parameter.
    """
    layers = (module for module in model.modules() if isinstance(module, _LAYERS))
    of_layers = (p for layer in layers for p in layer.parameters(recurse=False))
    for p in itertools.chain(of_layers, model.parameters()):
        if p.is_floating_point():
            return p
    return next(model.parameters())


def to_model(images: Tensor, model: nn.Module) -> Tensor:
    """Copy images to the device and type of a model; integer token ids keep their type.

    It is always a copy: a model may change its input in place, and images are used again.
    """
    parameter = first_layer_parameter(model)
    dtype = parameter.dtype if images.is_floating_point() else images.dtype
    return images.to(parameter.device, dtype, copy=True)


def input_of(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """Return the input of a layer, which may have been given by keyword."""
    found: Tensor = (*given, *named.values())[0]
    return found


@overload
def twice(values: Tensor) -> Tensor: ...


@overload
def twice(values: Tensor | None) -> Tensor | None: ...


def twice(values: Tensor | None) -> Tensor | None:
    """Return one sample and its copy `[2, ...]`, of a tensor `[1, ...]`.

    A batch of one has no stride between samples, and kernels of PyTorch guess the memory format
    from it: the backward pass of `BatchNorm2d` on the CPU returns wrong gradients where input and
    output gradient look different. Passes that form gradients never run a single sample.
    """
    return None if values is None else torch.cat([values, values])


def pair_of(images: Tensor) -> Tensor:
    """Return the first two images `[2, ...]`, or the only one twice, without their graph."""
    return (images[:2] if len(images) > 1 else twice(images[:1])).detach()
