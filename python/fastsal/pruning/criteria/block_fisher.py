"""Optimal Brain Surgeon (Hassibi & Stork, 1993) on blocks of the Fisher.

The score of WoodFisher (Singh & Alistarh, 2020, eq. 9) and oBERT (Kurtic et al., 2022, eq. 7).
"""

from __future__ import annotations

import torch

from fastsal.fisher.inverses import raise_failed
from fastsal.pruning.criteria.registry import Inputs, Scores, criterion


@criterion("block-fisher", needs_fisher=True, needs_damping=True)
def block_fisher(inputs: Inputs) -> Scores:
    """Return `θ_j² / (2 [A_b⁻¹]_jj)`, `A_b = F_b + λI`.

    Raises:
        FactorizationError: Blocks are not positive definite in float64; the message names them.
    """
    inverses = inputs.fisher.inverse_diagonals(inputs.damping, inputs.kept)
    scores = {}
    for name, w in inputs.weights.items():
        inverse = inverses[name]
        raise_failed(name, inverse.failed, inputs.damping)
        scores[name] = w.square() / (2 * torch.from_numpy(inverse.values).reshape(w.shape))
        inputs.errors[name] = inverse.errors
    return scores
