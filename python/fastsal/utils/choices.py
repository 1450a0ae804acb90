"""Choices that several rooms offer, each list written once; the command line reads them."""

from __future__ import annotations

from typing import Literal, get_args

# The gradients whose second moment the statistics are: of the loss at the true label (the empirical
# Fisher), at a label drawn from the model (the true Fisher), of matching noisy features.
Curvature = Literal["empirical", "sampled", "features"]
CURVATURES: tuple[Curvature, ...] = get_args(Curvature)

# Criteria by which weights are ranked, see `fastsal.pruning.criteria`.
CriterionName = Literal[
    "magnitude", "random", "taylor", "diag-fisher", "block-fisher", "obs-greedy"
]
CRITERION_NAMES: tuple[CriterionName, ...] = get_args(CriterionName)

# Weights that compete for a place: of the whole model, of one parameter, or of one parameter with
# Erdős-Rényi kernel densities.
Scope = Literal["global", "layer", "erk"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

# Type in which statistics are accumulated.
Precision = Literal["float32", "float64"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# What the processes of a distributed job send each other: rows of gradients, partial sums, or
# whichever is fewer bytes.
Exchange = Literal["rows", "sums", "auto"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)
