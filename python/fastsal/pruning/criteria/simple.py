"""Criteria without second-order information: magnitude, random and first order."""

from __future__ import annotations

import torch

from fastsal.pruning.criteria.registry import Inputs, Scores, criterion


@criterion("magnitude", needs_fisher=False)
def magnitude(inputs: Inputs) -> Scores:
    """Return `θ_j² / 2`, the loss increase if the Hessian were the identity."""
    return {name: w.square() / 2 for name, w in inputs.weights.items()}


@criterion("random", needs_fisher=False)
def random(inputs: Inputs) -> Scores:
    """Return seeded uniform numbers, the control for every other criterion."""
    return {
        name: torch.rand(w.shape, dtype=torch.float32, generator=inputs.generator, device="cpu")
        for name, w in inputs.weights.items()
    }


@criterion("taylor", needs_fisher=True)
def taylor(inputs: Inputs) -> Scores:
    """Return `|θ_j mean_n g_nj|` (SNIP, Lee et al. 2019; Molchanov et al. 2017)."""
    mean = inputs.fisher.mean_gradient()
    return {name: (w * mean[name]).abs() for name, w in inputs.weights.items()}
