"""The result of `prune_structure`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastsal.models.widths import Widths
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.reconstruction_result import Reconstruction
from fastsal.pruning.refit_result import RefitResult


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        units: Units of the groups.
        parameters: Parameters of the model.
        macs: Multiply-accumulates of linear layers and convolutions for one image.
        latency: Seconds of a forward pass, before pruning as measured, after it as predicted from
            measurements at several widths; None unless `budget` is `"latency"`.
    """

    units: int
    parameters: int
    macs: int
    latency: float | None = None


@dataclass(frozen=True)
class StructureResult:
    """The result of `prune_structure`.

    Attributes:
        structure: `"mlp"`, `"heads"` or `"channels"`.
        widths: Name of a layer or of an attention to its units before and after.
        removed: The same name to the numbers of the removed units, sorted, int64.
        costs: The same name to the cost of each unit, in the order in which they would go.
        before: Size of the model before.
        after: Size of the model now.
        left_out: Name of a layer to the reason why its units were not candidates.
        masks: Masks of the weights that became smaller, True everywhere, for calls that need masks.
        recorded: Numbers of layers that differ from those of the original model, as `save_weights`
            stores them.
        samples: Number of images.
        seconds: Duration of each step.
        held_out_loss: Error of held-out features after the fold, `½ ‖f_θ(x) − f(x)‖² / F`; None if
            nothing was decided by it.
        reconstruction: Result of solving for all layers again.
        refit: Result of the refitting.
    """

    structure: str
    widths: dict[str, tuple[int, int]]
    removed: dict[str, Tensor]
    costs: dict[str, Tensor]
    before: Size
    after: Size
    left_out: dict[str, str]
    masks: Masks
    recorded: Widths
    samples: int
    seconds: dict[str, float] = field(default_factory=dict)
    held_out_loss: float | None = None
    reconstruction: Reconstruction | None = None
    refit: RefitResult | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the costs."""
        return {
            "structure": self.structure,
            "widths": {name: list(both) for name, both in self.widths.items()},
            "removed": {name: units.tolist() for name, units in self.removed.items()},
            "before": vars(self.before),
            "after": vars(self.after),
            "left_out": dict(self.left_out),
            "samples": self.samples,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "held_out_loss": self.held_out_loss,
            "reconstruction": None
            if self.reconstruction is None
            else dataclasses.asdict(self.reconstruction),
            "refit": None if self.refit is None else self.refit.as_dict(),
        }

    def __repr__(self) -> str:
        return (
            f"StructureResult({self.structure}: {len(self.widths)} groups, "
            f"{self.before.units:,} -> {self.after.units:,} units, "
            f"{self.before.parameters:,} -> {self.after.parameters:,} parameters, "
            f"{self.before.macs:,} -> {self.after.macs:,} MACs, {len(self.left_out)} left out)"
        )
