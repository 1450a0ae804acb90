"""The result of `prune`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastsal.models.left_out import LeftOut
from fastsal.pruning.history import Round
from fastsal.pruning.limits.limit import SafetyReport
from fastsal.pruning.masks.in_use import InUse
from fastsal.pruning.masks.masks import Masks


@dataclass(frozen=True)
class PruneResult:
    """The result of `prune`.

    Attributes:
        masks: True = kept; all other weights of the model are zero.
        scores: Name to scores of the last round, float32.
        history: One entry for each round.
        safety: With `max_loss_increase` or `max_accuracy_drop`: the report of the test.
        left_out: The parameters that were not to be pruned, and their share of the model.
        in_use: Zeros of the weights in use, where layers compute them from parameters; None if that
            is not known.
    """

    masks: Masks
    scores: dict[str, Tensor]
    history: list[Round] = field(default_factory=list)
    safety: SafetyReport | None = None
    left_out: LeftOut | None = None
    in_use: InUse | None = None

    @property
    def effective_sparsity(self) -> float:
        """Fraction of zeros of the weights in use; that of the masks if it is not known."""
        return self.masks.sparsity if self.in_use is None else self.in_use.sparsity

    def __repr__(self) -> str:
        rounds = f"{len(self.history)} round{'s' if len(self.history) != 1 else ''}"
        last = f", last {self.history[-1]!r}" if self.history else ""
        safety = f", safety={self.safety!r}" if self.safety is not None else ""
        rest = "" if self.left_out is None else f", {self.left_out}"
        return f"PruneResult({self.masks!r}, {rounds}{last}{safety}{rest})"
