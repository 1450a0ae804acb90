"""The registry of criteria and their common input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher


@dataclass(frozen=True)
class Inputs:
    """The input of a criterion: some parameters of a model, or parts of them.

    Attributes:
        weights: Name to weights, detached, on the CPU, float64.
        statistics: The Fisher of these; None for criteria that need none.
        damping: Absolute `λ`.
        kept: Name to mask, True = still in the model; None for all.
        generator: Source of random numbers, shared by all parts of the model.
        errors: Filled by the criterion with bounds of its relative error, name to `[n_blocks]`.
    """

    weights: Mapping[str, Tensor]
    statistics: BlockFisher | None
    damping: float
    kept: Mapping[str, Tensor] | None
    generator: torch.Generator
    errors: dict[str, NDArray[np.float64]]

    @property
    def fisher(self) -> BlockFisher:
        """The statistics, for criteria that need them."""
        if self.statistics is None:
            raise InvalidArgument("fisher must be statistics from collect, got None")
        return self.statistics


Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Criterion:
    """A criterion: a named function that scores weights.

    Attributes:
        name: Value of the argument `criterion`.
        needs_fisher: Whether it needs statistics.
        needs_damping: Whether its scores depend on `λ`.
        needs_blocks: Whether it needs the packed blocks of F, also where gradients are kept.
        compute: Returns name to scores of the parameter's shape, from `Inputs`.
    """

    name: str
    needs_fisher: bool
    needs_damping: bool
    needs_blocks: bool
    compute: Callable[[Inputs], Scores] = field(repr=False)


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, *, needs_fisher: bool, needs_damping: bool = False, needs_blocks: bool = False
) -> Callable[[Callable[[Inputs], Scores]], Callable[[Inputs], Scores]]:
    """Register a function as a criterion."""

    def register(compute: Callable[[Inputs], Scores]) -> Callable[[Inputs], Scores]:
        CRITERIA[name] = Criterion(name, needs_fisher, needs_damping, needs_blocks, compute)
        return compute

    return register
