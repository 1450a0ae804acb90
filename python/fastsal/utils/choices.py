"""Choices that several rooms offer, each list written once; the command line reads them."""

from __future__ import annotations

from typing import Literal, get_args

# The gradients whose second moment the statistics are: of the loss at the true label (the empirical
# Fisher), at a label drawn from the model (the true Fisher), of matching noisy features.
Curvature = Literal["empirical", "sampled", "features"]
CURVATURES: tuple[Curvature, ...] = get_args(Curvature)
