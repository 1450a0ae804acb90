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

# The classifier that a task is measured through: ridge regression, k-nearest neighbors, logistic
# regression (a linear probe), or the model's own.
HeadKind = Literal["ridge", "knn", "probe", "own"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

# Image corruptions, see `fastsal.data.corruptions`.
CorruptionKind = Literal["gaussian-noise", "blur", "jpeg", "brightness", "contrast"]
CORRUPTION_KINDS: tuple[CorruptionKind, ...] = get_args(CorruptionKind)

# Learning rate schedules of fine-tuning: decay to zero along a cosine or linearly, or no decay.
Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

# What a study saves for each cell beside its numbers.
Saved = Literal["none", "masks", "models"]
SAVED: tuple[Saved, ...] = get_args(Saved)
