"""Second moments of the inputs of layers.

Axes: R rows, an input of a layer at one position (token, pixel) of one image; D columns of its flat
weight `[O, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsal.utils.float64 import in_float64

# Rows of one product in float32; products are added up in float64.
_ROWS = 4096


class Moments:
    """The mean and the second moment of vectors, summed in float64.

    Products of a few thousand vectors are computed in the type of the vectors, float32 as a rule,
    after the mean of the first ones was subtracted, and then added in float64.

    Args:
        size: Length D of the vectors.

    Attributes:
        count: Number of vectors.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(size, dtype=torch.float64, device="cpu")
        self._products = torch.zeros(size, size, dtype=torch.float64, device="cpu")

    def add(self, rows: Tensor) -> None:
        """Add vectors `[R, D]`, float32 or float64."""
        if self._shift is None:
            self._shift = rows[:_ROWS].mean(dim=0)
        for start in range(0, len(rows), _ROWS):
            centered = rows[start : start + _ROWS] - self._shift
            self._sum += in_float64(centered).sum(dim=0).cpu()
            self._products += (centered.T @ centered).cpu()
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """Mean `[D]`, float64."""
        assert self._shift is not None
        return self._sum / self.count + in_float64(self._shift.cpu())

    def covariance(self) -> Tensor:
        """Return `E[(h - Eh)(h - Eh)ᵀ]` `[D, D]`, float64."""
        offset = self._sum / self.count
        return (self._products / self.count).addr_(offset, offset, alpha=-1)

    def second_moment(self) -> Tensor:
        """Return `E[h hᵀ]` `[D, D]`, float64."""
        return self.covariance().addr_(self.mean, self.mean)


def input_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the inputs of a layer as rows of the columns of its flat weight.

    Args:
        layer: `Linear`, or a convolution without groups of one or two axes, padded with zeros.
        inputs: `[n, ..., D]`, or `[n, c, ...]` of a convolution.

    Returns:
        `[R, D]`, at least float32, with D = c times the size of the kernel for a convolution.
    """
    inputs = inputs.detach()
    if inputs.dtype in (torch.float16, torch.bfloat16):
        inputs = inputs.float()
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if set(layer.kernel_size) == {1} and not any(_padding(layer)):
        places: list[slice] = [slice(None), slice(None)]
        places += [slice(None, None, step) for step in layer.stride]
        return inputs[tuple(places)].movedim(1, -1).reshape(-1, inputs.shape[1])
    is_line = inputs.dim() == 3
    patches = nn.functional.unfold(
        inputs[:, :, None] if is_line else inputs,
        _pair(layer.kernel_size, 1),
        dilation=_pair(layer.dilation, 1),
        padding=_pair(_padding(layer), 0),
        stride=_pair(layer.stride, 1),
    )
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    if isinstance(layer.padding, tuple):
        return layer.padding
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))


def _pair(values: tuple[int, ...], first: int) -> tuple[int, int]:
    return (first, values[0]) if len(values) == 1 else (values[0], values[1])
