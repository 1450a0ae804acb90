"""One step of pruning: score, rank, compensate, mask; with the choice of a damping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fastsal.errors import PrecisionWarning
from fastsal.fisher.statistics import Statistics
from fastsal.pruning.damping import DampingChoice, Multiple, candidates, choose_damping
from fastsal.pruning.history import Round
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.shares import Sparsity
from fastsal.pruning.process import Process
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.shelf import Shelf, restore
from fastsal.utils.warn import without_warnings


@dataclass(frozen=True)
class StepResult:
    """The result of one step.

    Attributes:
        scores: Name to scores, float32.
        masks: True = kept.
        increase: Predicted loss increase; None without compensation.
    """

    scores: dict[str, Tensor]
    masks: Masks
    increase: float | None


@dataclass(frozen=True)
class Attempt:
    """A step that was measured on held-out images, and can be restored.

    Attributes:
        result: The result of the step.
        weights: Name to the weights after it.
        loss: Held-out loss after it.
    """

    result: StepResult
    weights: dict[str, Tensor]
    loss: float


@dataclass(frozen=True)
class Step:
    """Prunes a model in one step.

    Attributes:
        model: The model, pruned in place.
        chosen: Name to parameter that may be pruned.
        recipe: How to prune.
        process: Computes scores, masks and weights.
        shelf: Where copies of weights and scores are stored.
    """

    model: nn.Module
    chosen: Mapping[str, nn.Parameter]
    recipe: Recipe
    process: Process
    shelf: Shelf

    def run(
        self, fisher: Statistics | None, masks: Masks | None, goal: Sparsity | None, damping: float
    ) -> StepResult:
        """Score, rank and prune in place.

        Args:
            fisher: Statistics; None where the recipe needs none.
            masks: Masks of the previous round.
            goal: Sparsity; None where a pattern fixes it.
            damping: Absolute `λ`.
        """
        recipe, process, model = self.recipe, self.process, self.model
        scores = process.score(model, fisher, recipe, masks, damping)
        new = process.choose_masks(model, fisher, recipe, scores, goal, damping)
        increase = self.compensate(fisher, new, damping, before=masks)
        new.apply(model)
        return StepResult(scores, new, increase)

    def compensate(
        self,
        fisher: Statistics | None,
        masks: Masks,
        damping: float,
        *,
        before: Masks | None = None,
    ) -> float | None:
        """Update the kept weights in place, if the recipe says so; returns the loss increase."""
        if fisher is None or not self.recipe.compensate:
            return None
        return self.process.compensate(
            self.model, fisher, masks, damping, before=before, shelf=self.shelf
        )

    def given_damping(self, fisher: Statistics | None) -> float:
        """Return the absolute `λ` of a recipe that does not choose it."""
        damping = self.recipe.damping
        if fisher is None or not self.recipe.needs_damping or isinstance(damping, str):
            return 1.0  # not used
        if isinstance(damping, Multiple):
            return damping.of(self.process.mean_diagonal(fisher))
        return damping

    def choose_damping(
        self,
        fisher: Statistics,
        masks: Masks | None,
        goal: Sparsity | None,
        loss: Callable[[], float],
    ) -> tuple[DampingChoice, Attempt | None]:
        """Choose the damping with the least held-out loss, by attempts at pruning to a goal.

        Args:
            fisher: Statistics.
            masks: Masks of the previous round.
            goal: Sparsity; None where a pattern fixes it.
            loss: Measures the held-out loss of the model.

        Returns:
            The choice and the best attempt. The model has its original weights.
        """
        start = self.shelf.put("start", self.chosen)
        result: StepResult | None = None
        best: Attempt | None = None

        def prune_with(damping: float) -> None:
            nonlocal result
            restore(self.chosen, start, self.shelf)
            with without_warnings(PrecisionWarning):  # issued for the chosen damping only
                result = self.run(fisher, masks, goal, damping)

        def measure() -> float:
            nonlocal best, result
            value = loss()
            if result is not None and (best is None or value < best.loss):
                scores = self.shelf.put("scores", result.scores)
                weights = self.shelf.put("best", self.chosen)
                best = Attempt(replace(result, scores=scores), weights, value)
            result = None  # its scores are freed before the next ones are computed
            return value

        try:
            grid = candidates(self.process.mean_diagonal(fisher))
            return choose_damping(grid, prune_with, measure), best
        finally:
            restore(self.chosen, start, self.shelf)

    def record(
        self,
        number: int,
        fisher: Statistics | None,
        choice: DampingChoice,
        result: StepResult,
        seconds: dict[str, float],
    ) -> Round:
        """Return the entry of a round in the history."""
        plan = None if fisher is None else fisher.plan
        return Round(
            round=number,
            sparsity=result.masks.sparsity,
            samples=0 if fisher is None else fisher.samples,
            damping=choice.damping if self.recipe.needs_damping else None,
            damping_evidence=choice.evidence,
            predicted_increase=result.increase,
            seconds=seconds,
            memory_plan=None if plan is None else plan.as_dict(),
        )
