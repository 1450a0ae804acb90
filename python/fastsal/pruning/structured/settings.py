"""Checked settings of `prune_structure`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastsal.data.batches import check_samples
from fastsal.utils.choices import (
    BUDGETS,
    STRUCTURE_CRITERIA,
    STRUCTURE_SCOPES,
    STRUCTURES,
    WEIGHTINGS,
    Budget,
    Structure,
    StructureCriterion,
    StructureScope,
    Weighting,
)
from fastsal.utils.numbers import real, whole
from fastsal.utils.progress import Report
from fastsal.utils.sizes import parse_bytes
from fastsal.utils.suggestions import check_choice


@dataclass(frozen=True)
class Settings:
    """Arguments of `prune_structure` that its steps use; see there."""

    structure: Structure
    budget: Budget
    scope: StructureScope
    floor: float
    multiple: int | None
    criterion: StructureCriterion
    weighting: Weighting
    compensate: bool
    reconstruct: bool | None
    damping: float
    samples: int | None
    latency_batch: int
    memory_budget: int | str | None
    seed: int
    progress: bool | Report

    def checked(self) -> Settings:
        """Return the settings with plain numbers.

        Raises:
            InvalidArgument: A value is invalid.
        """
        for name, choices in (
            ("structure", STRUCTURES),
            ("budget", BUDGETS),
            ("scope", STRUCTURE_SCOPES),
            ("criterion", STRUCTURE_CRITERIA),
            ("weighting", WEIGHTINGS),
        ):
            check_choice(name, getattr(self, name), choices)
        room = self.memory_budget
        return replace(
            self,
            floor=real("floor", self.floor, least=0, most=1),
            multiple=None if self.multiple is None else whole("multiple", self.multiple, 1),
            damping=real("damping", self.damping, above=0),
            samples=check_samples(self.samples),
            latency_batch=whole("latency_batch", self.latency_batch, 1),
            memory_budget=None if room is None else parse_bytes(room),
            seed=whole("seed", self.seed, 0),
        )

    @property
    def reconstructs(self) -> bool:
        """Whether layers are solved for again, if there is room."""
        return self.compensate if self.reconstruct is None else self.reconstruct

    def sparsity_of(self, sparsity: Any) -> float:
        """Return a checked sparsity."""
        return real("sparsity", sparsity, least=0, below=1)

    def recipe(self) -> dict[str, Any]:
        """Return plain values that describe how a model was pruned."""
        left_out = ("progress", "memory_budget")
        return {name: value for name, value in vars(self).items() if name not in left_out}
