"""The effect of a reconstruction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reconstruction:
    """The effect of a reconstruction on the held-out loss.

    An image counts at most what the mean feature costs.

    Attributes:
        before: Mean loss before it.
        after: Mean loss after it.
        kept: Whether it was kept: it lowered the loss or, before the last round, did not raise it
            by more than half.
        layers: Number of layers whose kept weights were solved for.
        images: Number of images that they were solved on.
    """

    before: float
    after: float
    kept: bool
    layers: int
    images: int
