"""Optimal Brain Surgeon, one weight at a time in each block (Hassibi & Stork, 1993)."""

from __future__ import annotations

import numpy as np
import torch

import fastsal._core as _core
from fastsal.errors import DataError
from fastsal.fisher.block_fisher import sums_of
from fastsal.fisher.inverses import error_bound, raise_failed
from fastsal.pruning.criteria.registry import Inputs, Scores, criterion


@criterion("obs-greedy", needs_fisher=True, needs_damping=True, needs_blocks=True)
def obs_greedy(inputs: Inputs) -> Scores:
    """Return the running maximum of the elimination costs in each block.

    In each block: remove the weight with the least `θ_j² / (2 [A⁻¹]_jj)`, update the others by
    `-A⁻¹ e_j θ_j / [A⁻¹]_jj`, remove row and column j from `A⁻¹`, repeat. The score of a weight is
    the largest cost up to its removal, so that any global threshold prunes the first weights of
    each block's own order.

    Raises:
        FactorizationError: Blocks are not positive definite in float64; the message names them.
    """
    sums = sums_of(inputs.fisher)
    parameters, block_size = sums.all_for_core(inputs.kept)
    names = inputs.fisher.names
    weights = [inputs.weights[name].reshape(-1).float().numpy() for name in names]
    results = _core.eliminate(parameters, weights, block_size, inputs.damping)
    scores = {}
    for name, (values, _, failed, sensitivity) in zip(names, results, strict=True):
        raise_failed(name, failed, inputs.damping)
        if np.isposinf(values).any():
            raise DataError(
                f"scores of {name!r} must fit float32, got infinity; scale the loss down, or the "
                "weights"
            )
        scores[name] = torch.from_numpy(values).reshape(inputs.weights[name].shape)
        inputs.errors[name] = error_bound(sums, name, sensitivity)
    return scores
