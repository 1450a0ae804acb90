"""Optimal Brain Damage (LeCun et al., 1989, eq. 5), with the Fisher in place of the Hessian."""

from __future__ import annotations

from fastsal.pruning.criteria.registry import Inputs, Scores, criterion


@criterion("diag-fisher", needs_fisher=True)
def diag_fisher(inputs: Inputs) -> Scores:
    """Return `θ_j² F_jj / 2`."""
    diagonal = inputs.fisher.diagonal()
    return {name: w.square() * diagonal[name] / 2 for name, w in inputs.weights.items()}
