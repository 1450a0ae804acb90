"""Run a model on another device for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastsal.utils.devices import resolve_device
from fastsal.utils.interrupts import uninterrupted


@contextlib.contextmanager
def on_device(
    model: nn.Module, device: str | torch.device | None, *, keeps: bool = False
) -> Iterator[None]:
    """Move a model to a device for the block; at the end it has its own tensors again.

    Args:
        model: Any module.
        device: As for `resolve_device`; None leaves the model where it is.
        keeps: Whether values that change inside the block are copied back. Without it the model has
            the values from before.

    Raises:
        InvalidArgument: The name is not that of a device of this machine.
    """
    if device is None:
        yield
        return
    target = resolve_device(device)
    # By their modules, as some devices and settings of PyTorch make other parameters.
    parameters = [
        (module, name, p, p.data, p.grad)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
    ]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    here = [p for _, _, p, *_ in parameters] + [buffer for *_, buffer in buffers]
    if all(tensor.device == target for tensor in here):
        yield
        return
    try:
        for _, _, p, *_ in parameters:
            p.grad = None
        model.to(target)
        yield
    finally:
        with torch.no_grad(), uninterrupted():
            for module, name, p, before, gradient in parameters:
                if keeps:
                    before.copy_(getattr(module, name).data)
                p.data = before
                p.grad = gradient
                if getattr(module, name) is not p:
                    setattr(module, name, p)
            for module, name, before in buffers:
                if keeps:
                    before.copy_(getattr(module, name))
                setattr(module, name, before)


def autocasting(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    """Return `torch.autocast` of a dtype; of None, a context that leaves the setting as it is."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
