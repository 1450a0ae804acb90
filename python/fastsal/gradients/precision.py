"""The dtype of per-sample gradients.

Rows of 16-bit weights are computed in float32. Products of two 16-bit numbers are exact there, so
that the only rounding is that of the model's own activations and gradients. In float16 most rows
would underflow after unscaling (below 6e-8), and bfloat16 would round every entry to eight bits
once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsal.models.evaluating import without_autocast


def row_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of the rows of a parameter: float32, or float64 for float64 weights."""
    return torch.promote_types(parameter.dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert a 16-bit tensor to float32; return any other tensor as it is."""
    return tensor.to(row_dtype(tensor))


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 in matrix products on CUDA, whose ten bits of mantissa would change inverses.

    An autocast of the caller, with fewer bits yet, is disabled too.

    The settings of the process are restored exactly, whether they were made by `allow_tf32` and
    `set_float32_matmul_precision` or by `fp32_precision` (from PyTorch 2.9 on). Those two must not
    be mixed: after a setting by one, reading the other may raise.
    """
    restore = _disable_tf32()
    try:
        with without_autocast():
            yield
    finally:
        restore()


def _disable_tf32() -> Callable[[], None]:
    """Disable TF32; returns what restores the settings."""
    matmul = torch.backends.cuda.matmul
    try:
        is_on = matmul.allow_tf32
    except RuntimeError:
        return _disable_by_precision(matmul)
    if not is_on:
        return lambda: None
    try:
        name = torch.get_float32_matmul_precision()  # "high" and "medium" allow TF32
    except RuntimeError:  # where that of the CPU was set by the other names
        name = "high"
    cpu = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
    cpu_precision = getattr(cpu, "fp32_precision", None)
    matmul.allow_tf32 = False

    def restore() -> None:
        matmul.allow_tf32 = True
        if name != "high":
            torch.set_float32_matmul_precision(name)
            if cpu_precision is not None:  # which the line before has set too
                cpu.fp32_precision = cpu_precision  # type: ignore[union-attr]

    return restore


def _disable_by_precision(operation: Any) -> Callable[[], None]:
    """Disable TF32 of an operation that has `fp32_precision`, set there or for all operations."""
    before = operation.fp32_precision
    if before in ("ieee", "none"):
        return lambda: None
    operation.fp32_precision = "none"  # then that of all operations applies
    if operation.fp32_precision == before:
        before = "none"
    operation.fp32_precision = "ieee"

    def restore() -> None:
        operation.fp32_precision = before

    return restore


@contextlib.contextmanager
def convolutions_in_float32() -> Iterator[None]:
    """Disable TF32 in convolutions on CUDA, where it is on by default; the setting is restored."""
    cudnn: Any = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # from PyTorch 2.9 on
        restore = _disable_by_precision(cudnn.conv)
    else:
        restore = partial(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        cudnn.allow_tf32 = False
    try:
        yield
    finally:
        restore()
