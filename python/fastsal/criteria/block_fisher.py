"""Optimal Brain Surgeon (Hassibi & Stork, 1993) on blocks of the empirical Fisher.

The score of WoodFisher (Singh & Alistarh, 2020, eq. 9) and oBERT (Kurtic et al., 2022, eq. 7).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fastsal.criteria.registry import Inputs, Scores, criterion
from fastsal.errors import FactorizationError, PrecisionWarning

_TOLERANCE = 0.01


@criterion("block-fisher", needs_fisher=True, needs_damping=True)
def block_fisher(inputs: Inputs) -> Scores:
    """`θ_j² / (2 [A_b⁻¹]_jj)`, `A_b = F_b + λI`.

    Raises:
        FactorizationError: Blocks are not positive definite in double precision; names them.

    Warns:
        PrecisionWarning: The error bound of a parameter's scores passes one per cent.
    """
    inverses = inputs.fisher.inverse_diagonals(inputs.damping, inputs.kept)
    scores = {}
    for name, w in inputs.weights.items():
        inverse = inverses[name]
        raise_failed(name, inverse.failed, inputs.damping)
        scores[name] = w.square() / (2 * torch.from_numpy(inverse.values).reshape(w.shape))
    warn_imprecise({name: inverses[name].errors for name in inputs.weights}, inputs)
    return scores


def warn_imprecise(errors: Mapping[str, NDArray[np.float64]], inputs: Inputs) -> None:
    """Warn where the error bound of scores, name to `[n_blocks]`, passes one per cent."""
    worst = {name: float(bounds.max(initial=0.0)) for name, bounds in errors.items()}
    doubtful = {name: error for name, error in worst.items() if error > _TOLERANCE}
    if doubtful:
        name = max(doubtful, key=lambda n: doubtful[n])
        blocks = int((errors[name] > _TOLERANCE).sum())
        others = f" and {len(doubtful) - 1} other parameters" if len(doubtful) > 1 else ""
        warnings.warn(
            f"scores of {name!r}{others}: rounding of the {inputs.fisher.precision} sums may "
            f"change them by up to {min(doubtful[name], 1):.0%} ({blocks} of its blocks pass 1 %) "
            f"at damping {inputs.damping:g}; collect with precision='float64' or damp more",
            PrecisionWarning,
            stacklevel=5,
        )


def raise_failed(name: str, failed: list[int], damping: float) -> None:
    """Raise FactorizationError when blocks of a parameter failed."""
    if failed:
        listed = ", ".join(map(str, failed[:5])) + (", ..." if len(failed) > 5 else "")
        raise FactorizationError(
            f"damping: {len(failed)} blocks of {name!r} ({listed}) are not positive definite with "
            f"λ = {damping:g}; takes a larger λ (gradients near the float32 range also do this: "
            "collect with precision='float64')"
        )
