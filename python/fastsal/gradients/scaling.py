"""Loss scaling, which keeps float16 gradients from underflowing (below 6e-8).

The scale is a power of two and is divided out in float32, so that unscaling is exact (Micikevicius
et al., 2018, "Mixed Precision Training", section 3.2). As in `torch.amp.GradScaler`, it starts at
2¹⁶, is halved when a gradient overflows, and is doubled after a number of passes without overflow.
In addition it is raised if all gradients of the first two samples are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import as_real

_START = 2.0**16
_LEAST, _MOST = 2.0**-16, 2.0**48
# Passes without overflow after which the scale doubles. A failed attempt costs one backward pass;
# without doubling, one overflow would let the small gradients of all later samples underflow.
_PATIENCE = 64
# Range for the largest scaled gradient. Float16 ends at 65,504; the target leaves a factor of 32
# for other samples.
_LOW, _AIM = 2.0**6, 2.0**11
# Factor by which the scale is raised if all gradients are zero.
_STEP = 2.0**8


class LossScale:
    """The loss scale of the next backward pass.

    Args:
        start: Initial scale; 1 disables scaling.
        is_automatic: Whether the scale may exceed its initial value.

    Attributes:
        value: The scale, a power of two.
        is_active: Whether losses are scaled.
    """

    def __init__(self, start: float, *, is_automatic: bool = True) -> None:
        self.value = self._start = start
        self.is_active = start != 1
        self._is_automatic = is_automatic
        self._passes = 0
        self._has_overflowed = False

    @classmethod
    def of(
        cls, asked: float | None, autocast: torch.dtype | None, weights: Iterable[Tensor]
    ) -> LossScale:
        """Choose the initial scale.

        Args:
            asked: A power of two; None for 2¹⁶ with float16 weights or autocast, otherwise 1.
            autocast: Type of the passes, or None.
            weights: Weights of the model.

        Raises:
            InvalidArgument: `asked` is not a power of two in [2⁻¹⁶, 2⁴⁸].
        """
        if asked is None:
            is_half = autocast == torch.float16 or any(w.dtype == torch.float16 for w in weights)
            return cls(_START if is_half else 1.0)
        scale = as_real(asked)
        if scale is None or not (_LEAST <= scale <= _MOST and math.frexp(scale)[0] == 0.5):
            raise InvalidArgument(
                "loss_scale must be a power of two from 2**-16 to 2**48, or None, got "
                f"{asked!r:.80}"
            )
        return cls(scale, is_automatic=False)

    def back_off(self) -> bool:
        """Halve the scale after an overflow; return False if it cannot be reduced further."""
        self._passes = 0
        self._has_overflowed = True
        if not self.is_active or self.value <= _LEAST:
            return False
        self.value /= 2
        return True

    def rise(self, largest: float) -> bool:
        """Raise the scale if the largest scaled gradient is small; return whether it changed."""
        if not (self.is_active and self._is_automatic) or self._has_overflowed:
            return False
        if largest >= _LOW or self.value >= _MOST:
            return False
        factor = 2.0 ** math.floor(math.log2(_AIM / largest)) if largest > 0 else _STEP
        self.value = min(_MOST, self.value * factor)
        return True

    def passed(self) -> None:
        """Count a pass without overflow, after which the scale may double."""
        self._passes += 1
        most = _MOST if self._is_automatic else self._start
        if self.is_active and self._passes % _PATIENCE == 0 and self.value < most:
            self.value *= 2

    def scaled(self, losses: Tensor) -> Tensor:
        """Multiply losses by the scale; they are float32 or wider."""
        return losses * self.value if self.is_active else losses

    def undone(self, gradient: Tensor) -> Tensor:
        """Divide a gradient by the scale; it is float32 or wider."""
        return gradient / self.value if self.is_active else gradient

    def copy(self) -> LossScale:
        """Return an independent copy with the current scale."""
        other = LossScale(self.value, is_automatic=self._is_automatic)
        other.is_active = self.is_active
        return other


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite; synchronizes with the device once."""
    flags = [torch.isfinite(t).all() for t in tensors]
    return not flags or bool(torch.stack(flags).all())


def largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude; synchronizes with the device once."""
    found = [t.abs().max().float() for t in tensors if t.numel()]
    return float(torch.stack(found).max()) if found else 0.0
