"""Loss scaling: float16 gradients below 6e-8 are zero unless losses are multiplied beforehand.

The factor is a power of two and is divided out in float32, so that undoing it is exact
(Micikevicius et al., 2018, "Mixed precision training", section 3.2). As `torch.amp.GradScaler`
does, it begins at 2¹⁶, halves when a gradient overflows, and doubles again after a while. Beyond
that it is raised where the first two samples show that all gradients are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument

_START = 2.0**16
_LEAST, _MOST = 2.0**-16, 2.0**48
# Passes without an overflow after which the factor doubles: a try that fails costs one backward
# pass, and one sample that overflows must not take the small gradients of all later ones.
_PATIENCE = 64
# Where the largest gradient may be, of a type that ends at 65,504; a factor of 32 is left for
# samples that were not seen.
_LOW, _AIM = 2.0**6, 2.0**11
# What a factor is raised by at a time where everything is zero.
_STEP = 2.0**8


class LossScale:
    """The factor of the next backward pass.

    Args:
        start: The factor to begin with; 1 means no scaling at all.
        is_automatic: Whether it may grow beyond its start.

    Attributes:
        value: The factor, a power of two.
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
        """Choose where to begin.

        Args:
            asked: A power of two, or None for 2¹⁶ where float16 takes part and 1 elsewhere.
            autocast: Type of the passes.
            weights: Of the model.

        Raises:
            InvalidArgument: `asked` is no power of two.
        """
        if asked is None:
            is_half = autocast == torch.float16 or any(w.dtype == torch.float16 for w in weights)
            return cls(_START if is_half else 1.0)
        is_number = isinstance(asked, (int, float)) and not isinstance(asked, bool)
        if not (is_number and _LEAST <= asked <= _MOST and math.frexp(asked)[0] == 0.5):
            raise InvalidArgument(
                f"loss_scale: got {asked!r}; takes a power of two from 2**-16 to 2**48, which can "
                "be undone exactly, or None"
            )
        return cls(float(asked), is_automatic=False)

    def back_off(self) -> bool:
        """Halve the factor after an overflow; False where it is no use to go on."""
        self._passes = 0
        self._has_overflowed = True
        if not self.is_active or self.value <= _LEAST:
            return False
        self.value /= 2
        return True

    def rise(self, largest: float) -> bool:
        """Raise the factor where the largest gradient under it is small; False where it stays."""
        if not (self.is_active and self._is_automatic) or self._has_overflowed:
            return False
        if largest >= _LOW or self.value >= _MOST:
            return False
        factor = 2.0 ** math.floor(math.log2(_AIM / largest)) if largest > 0 else _STEP
        self.value = min(_MOST, self.value * factor)
        return True

    def passed(self) -> None:
        """Count a pass without overflow."""
        self._passes += 1
        most = _MOST if self._is_automatic else self._start
        if self.is_active and self._passes % _PATIENCE == 0 and self.value < most:
            self.value *= 2

    def scaled(self, losses: Tensor) -> Tensor:
        """Multiply losses, which are float32 or wider."""
        return losses * self.value if self.is_active else losses

    def undone(self, gradient: Tensor) -> Tensor:
        """Divide a gradient, which is float32 or wider."""
        return gradient / self.value if self.is_active else gradient

    def copy(self) -> LossScale:
        """Return another that begins where this one is."""
        other = LossScale(self.value, is_automatic=self._is_automatic)
        other.is_active = self.is_active
        return other


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is NaN or infinite; waits for the device once."""
    flags = [torch.isfinite(t).all() for t in tensors]
    return not flags or bool(torch.stack(flags).all())


def largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude; waits for the device once."""
    found = [t.abs().max().float() for t in tensors if t.numel()]
    return float(torch.stack(found).max()) if found else 0.0
