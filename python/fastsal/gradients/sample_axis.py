"""Whether two samples are apart in a gradient, and on which axis.

The loss of one sample must not affect the other sample's part of the gradient of a tensor: under
the first loss alone the second part is zero, and under both losses the first part is that of the
first loss alone. The latter holds up to rounding: kernels of a GPU sum in an order that changes,
and TF32 or 16 bits make more of it. Where the difference is larger than that, the gradient under
the second loss alone tells, whose first part must be zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsal.gradients.precision import at_least_float32

# Relative difference between a sample's gradient with and without the other sample's loss, above
# which a third pass decides.
_SAME = 1e-3
# The same of the part that should not be there at all, in roundings of its type. Kernels may round
# samples together: MKL transforms two real signals as one complex one.
_ROUNDINGS = 64


@dataclass
class SplitGradient:
    """A gradient under the first loss, under the sum of both losses, and under the second loss.

    Attributes:
        shape: Shape of the tensor.
        any_layout: Whether samples may be the last leading axis.
        first: None if the first loss does not reach the tensor.
        both: None if neither does.
        second: None too if that pass was not necessary.
        samples_first: Whether samples are outermost (True) or the last leading axis (False); None
            if they are not apart.
    """

    shape: Sequence[int]
    any_layout: bool
    first: Tensor | None = None
    both: Tensor | None = None
    second: Tensor | None = None
    samples_first: bool | None = None

    def find_layout(self, *, has_second: bool) -> bool:
        """Find where the samples are; returns whether the second loss alone must tell.

        Args:
            has_second: Whether it has told.
        """
        if self.both is None:
            return False
        layouts: list[tuple[bool, tuple[int, ...], int]] = []
        if self.shape[0] % 2 == 0:
            layouts.append((True, (2, -1), 0))
        positions = math.prod(self.shape[:-1])
        if self.any_layout and positions % 2 == 0:
            layouts.append((False, (positions // 2, 2, self.shape[-1]), 1))
        is_open = False
        for samples_first, shape, axis in layouts:
            found = self._is_apart(shape, axis, has_second=has_second)
            if found:
                self.samples_first = samples_first
                return False
            is_open = is_open or found is None
        return is_open

    def _is_apart(self, shape: tuple[int, ...], axis: int, *, has_second: bool) -> bool | None:
        """Whether the loss of a sample does not affect the other sample's part; None if open."""
        assert self.both is not None
        both = _parts(self.both, shape, axis)[0]
        if self.first is None:
            return not bool(both.any())
        limit = min(_SAME, _ROUNDINGS * torch.finfo(self.both.dtype).eps)
        mine, other = _parts(self.first, shape, axis)
        if float(other.norm()) > limit * float(mine.norm()):
            return False
        if float((mine - both).norm()) <= _SAME * float(mine.norm()):
            return True
        if not has_second or self.second is None:
            return has_second or None
        other, mine = _parts(self.second, shape, axis)
        return float(other.norm()) <= limit * float(mine.norm())


def _parts(gradient: Tensor, shape: tuple[int, ...], axis: int) -> tuple[Tensor, Tensor]:
    """Return the parts of both samples, NaN as zero; norms overflow in float16."""
    wide = torch.nan_to_num(at_least_float32(gradient.detach()).reshape(shape), nan=0.0)
    first, second = wide.unbind(axis)
    return first, second
