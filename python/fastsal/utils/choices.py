"""Choices that several rooms offer, each list written once; the command line reads them."""

from __future__ import annotations

from typing import Literal, get_args

# The gradients whose second moment the statistics are: of the loss at the true label (the empirical
# Fisher), at a label drawn from the model (the true Fisher), of matching noisy features.
Curvature = Literal["empirical", "sampled", "features"]
CURVATURES: tuple[Curvature, ...] = get_args(Curvature)

# The classifier that a task is measured through: ridge regression, k-nearest neighbors, logistic
# regression (a linear probe), or the model's own.
HeadKind = Literal["ridge", "knn", "probe", "own"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

# Image corruptions, see `fastsal.data.corruptions`.
Corruption = Literal["gaussian-noise", "blur", "jpeg", "brightness", "contrast"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)

# What a study saves for each cell beside its numbers.
Saved = Literal["none", "masks", "models"]
SAVED: tuple[Saved, ...] = get_args(Saved)

# Learning-rate schedules of fine-tuning.
Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
