"""The registry of criteria, and what each of them is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher


@dataclass(frozen=True)
class Inputs:
    """What a criterion is computed from: some parameters of a model, or parts of them.

    Attributes:
        weights: Name to weights, detached, on the CPU, float64.
        statistics: The Fisher of these, or None for criteria that need none.
        damping: `λ`.
        kept: Name to mask, True = still in the model, or None for all.
        generator: For criteria with chance in them; goes on from one part of the model to the next.
        errors: Where a criterion puts bounds of its relative error, name to `[n_blocks]`.
    """

    weights: Mapping[str, Tensor]
    statistics: BlockFisher | None
    damping: float
    kept: Mapping[str, Tensor] | None
    generator: torch.Generator
    errors: dict[str, NDArray[np.float64]]

    @property
    def fisher(self) -> BlockFisher:
        """The statistics, which the criterion needs."""
        if self.statistics is None:
            raise InvalidArgument("fisher: is None; this criterion needs statistics from collect")
        return self.statistics


Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Criterion:
    """A named way to score weights.

    Attributes:
        name: As users write it.
        needs_fisher: Whether statistics are needed.
        needs_damping: Whether `λ` changes the scores.
        compute: Inputs to name and scores, each of the parameter's shape.
    """

    name: str
    needs_fisher: bool
    needs_damping: bool
    compute: Callable[[Inputs], Scores]


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, *, needs_fisher: bool, needs_damping: bool = False
) -> Callable[[Callable[[Inputs], Scores]], Callable[[Inputs], Scores]]:
    """Register a function as a criterion."""

    def register(compute: Callable[[Inputs], Scores]) -> Callable[[Inputs], Scores]:
        CRITERIA[name] = Criterion(name, needs_fisher, needs_damping, compute)
        return compute

    return register
