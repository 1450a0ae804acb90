"""Valid values of arguments, defined once for functions and for the command line."""

from __future__ import annotations

from typing import Literal, get_args

# Loss whose per-sample gradients define the statistics: at the given label (empirical Fisher), at a
# label drawn from the model (true Fisher), or of matching noisy features.
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
