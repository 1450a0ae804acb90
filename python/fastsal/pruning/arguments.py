"""The arguments of one call of `prune`, in the form in which it uses them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastsal.data.batches import Batches
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.errors import InvalidArgument
from fastsal.gradients.losses import LossFunction
from fastsal.models.wrappers import unwrapped
from fastsal.pruning.masks.shares import Sparsity, checked_sparsity
from fastsal.pruning.refit.settings import Refit
from fastsal.utils.choices import (
    WEIGHT_BUDGETS,
    CriterionName,
    Curvature,
    Precision,
    Scope,
    WeightBudget,
)
from fastsal.utils.numbers import real, whole
from fastsal.utils.suggestions import check_choice


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of `prune`, whose docstring describes them."""

    model: nn.Module
    batches: Batches | None
    sparsity: Sparsity | None
    criterion: CriterionName
    rounds: int
    compensate: bool
    damping: float | str
    samples: int | None
    block_size: int | None
    scope: Scope
    pattern: str | None
    floor: float
    loss: str | LossFunction
    curvature: Curvature | None
    parameters: str | Sequence[str] | None
    precision: Precision
    micro_batch: int | None
    autocast: torch.dtype | None
    loss_scale: float | None
    memory_budget: int | str | None
    scratch: str | os.PathLike[str] | None
    scratch_budget: int | str | None
    progress: bool | Callable[[int, int | None], None]
    seed: int
    max_loss_increase: float | None
    max_accuracy_drop: float | None
    loss_cap: float | None
    confidence: float
    held_out: Batches | None
    recalibrate: bool | None
    reconstruct: bool | None
    checkpoint: str | os.PathLike[str] | None
    head: str | Sequence[str] | None = None
    batch: BatchRule | None = None
    refit: str | Sequence[str] | Refit | None = None
    budget: WeightBudget = "weights"

    @property
    def has_limit(self) -> bool:
        """Whether the sparsity is searched for within a limit."""
        return self.max_loss_increase is not None or self.max_accuracy_drop is not None

    @property
    def is_by_macs(self) -> bool:
        """Whether the sparsity is a fraction of the multiply-accumulates.

        Raises:
            InvalidArgument: The budget is unknown, or excludes another argument.
        """
        check_choice("budget", self.budget, WEIGHT_BUDGETS)
        if self.budget == "weights":
            return False
        if self.scope != "global":
            raise InvalidArgument(
                f"scope must be 'global' with budget={self.budget!r}, got {self.scope!r}"
            )
        if self.pattern is not None:
            raise InvalidArgument(
                f"pattern must be None with budget={self.budget!r}, got {self.pattern!r}"
            )
        return True

    def normalized(self) -> Arguments:
        """Return them with plain numbers, the unwrapped model, and batches by the rule.

        Raises:
            InvalidArgument: A number is invalid, or the rule is not a function.
        """
        sparsity, samples = self.sparsity, self.samples
        if sparsity is not None:
            sparsity = checked_sparsity(sparsity)
        return replace(
            self,
            model=unwrapped(self.model),
            batches=ruled(self.batches, self.batch),
            held_out=ruled(self.held_out, self.batch),
            sparsity=sparsity,
            rounds=whole("rounds", self.rounds, 1),
            samples=None if samples is None else whole("samples", samples, 1),
            floor=real("floor", self.floor, least=0, most=1),
        )
