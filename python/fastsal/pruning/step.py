"""What one step of pruning does: score, rank, compensate, mask; with a damping that is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fastsal.data.batches import Batches
from fastsal.errors import InvalidArgument, PrecisionWarning
from fastsal.fisher.checks import check_damping
from fastsal.fisher.memory_plan import MemoryPlan
from fastsal.fisher.statistics import Statistics
from fastsal.models.selection import model_parameters
from fastsal.pruning.compensation import moves
from fastsal.pruning.criteria import CRITERIA, score
from fastsal.pruning.damping import DampingChoice, candidates, choose_damping
from fastsal.pruning.masks.joint import LARGEST_GROUP, rank_pattern
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.patterns import Pattern
from fastsal.pruning.masks.ranking import rank
from fastsal.pruning.measured import Measured
from fastsal.pruning.shelf import Shelf, restore


@dataclass(frozen=True)
class Outcome:
    """What a step of pruning came to.

    Attributes:
        scores: Name to float32.
        masks: True = kept.
        increase: Predicted loss increase after compensation; None without.
    """

    scores: dict[str, Tensor]
    masks: Masks
    increase: float | None


@dataclass(frozen=True)
class Attempt:
    """A step that was measured on held-out images, and can be taken up again.

    Attributes:
        outcome: What it came to.
        weights: Name to the weights after it.
        loss: Held-out loss.
    """

    outcome: Outcome
    weights: dict[str, Tensor]
    loss: float


@dataclass(frozen=True)
class Plan:
    """How to prune: what is the same in every round and for every sparsity.

    Attributes:
        criterion: One of `CRITERIA`.
        needs_fisher: Whether statistics are needed, for scores or compensation.
        needs_damping: Whether `λ` is.
        compensate: Whether kept weights move.
        damping: `λ`, or `"auto"`.
        ranking: Arguments of `rank` but scores and sparsity.
        parameters: Names or patterns.
        block_size: Of the statistics.
        seed: Of everything with chance in it.
        shelf: Where copies of weights and scores are kept.
    """

    criterion: str
    needs_fisher: bool
    needs_damping: bool
    compensate: bool
    damping: float | str
    ranking: Mapping[str, Any]
    parameters: str | Sequence[str] | None
    block_size: int | None
    seed: int
    shelf: Shelf = field(default_factory=Shelf)

    @property
    def is_auto(self) -> bool:
        """Whether `λ` is chosen here."""
        return self.needs_damping and self.damping == "auto"

    @property
    def joins_groups(self) -> bool:
        """Whether groups of a pattern are judged by their joint cost."""
        pattern = self.ranking["pattern"]
        if pattern is None or not CRITERIA[self.criterion].needs_damping:
            return False
        return Pattern.parse(pattern).m <= LARGEST_GROUP

    def check(self, rounds: int, batches: Batches | None, *, recalibrate: bool) -> None:
        """Raise InvalidArgument for what does not fit together."""
        if not isinstance(rounds, int) or rounds < 1:
            raise InvalidArgument(f"rounds: got {rounds!r}; takes 1 or more")
        if rounds > 1 and (pattern := self.ranking["pattern"]) is not None:
            raise InvalidArgument(
                f"rounds: got {rounds} with pattern {pattern!r}, which is reached in one; takes 1"
            )
        if isinstance(self.damping, str) and self.damping != "auto":
            raise InvalidArgument(f"damping: got {self.damping!r}; takes a number or 'auto'")
        if self.needs_damping and not isinstance(self.damping, str):
            check_damping(self.damping)
        if self.needs_fisher and batches is None:
            raise InvalidArgument(
                f"batches: is None; {self.criterion!r} or compensation needs labelled images"
            )
        if recalibrate and not self.needs_fisher:
            raise InvalidArgument(
                "recalibrate: is tested on images held out of the statistics, and there are none; "
                "takes a criterion with statistics, or compensate=True"
            )
        if (rounds > 1 or recalibrate) and isinstance(batches, Iterator):
            raise InvalidArgument(
                "batches: is an iterator, which gives its images once; with several rounds or "
                "recalibrate=True takes a list, a DataLoader or anything else that can be iterated "
                "again"
            )

    def step(
        self,
        model: nn.Module,
        fisher: Statistics | None,
        masks: Masks | None,
        goal: float | None,
        damping: float,
    ) -> Outcome:
        """Score, rank and prune in place."""
        scores = self.score(model, fisher, masks, damping)
        new = self.rank(model, fisher, scores, goal, damping)
        increase = self.move(model, fisher, new, damping, before=masks)
        new.apply(model)
        return Outcome(scores, new, increase)

    def score(
        self, model: nn.Module, fisher: Statistics | None, masks: Masks | None, damping: float
    ) -> dict[str, Tensor]:
        """Name to scores, by the criterion."""
        named = {} if fisher is not None else {"parameters": self.parameters}
        return score(model, fisher, self.criterion, damping, masks=masks, seed=self.seed, **named)

    def rank(
        self,
        model: nn.Module,
        fisher: Statistics | None,
        scores: Mapping[str, Tensor],
        goal: float | None,
        damping: float,
    ) -> Masks:
        """Masks from scores or, for a pattern, from joint costs."""
        if fisher is not None and self.joins_groups:
            return rank_pattern(model, fisher, sparsity=goal, damping=damping, **self.ranking)
        return rank(scores, goal, **self.ranking)

    def move(
        self,
        model: nn.Module,
        fisher: Statistics | None,
        masks: Masks,
        damping: float,
        *,
        before: Masks | None = None,
    ) -> float | None:
        """Compensate in place, where that is wanted; the predicted increase of the loss."""
        if fisher is None or not self.compensate:
            return None
        owned = model_parameters(model, fisher.shapes)
        moved, report = moves(owned, fisher, masks, damping, before=before, shelf=self.shelf)
        restore(owned, moved, self.shelf)
        return report.total

    def grid(self, fisher: Statistics) -> list[float]:
        """Dampings to try."""
        return candidates(fisher)

    def choose(
        self,
        model: nn.Module,
        fisher: Statistics | None,
        masks: Masks | None,
        goal: float | None,
        chosen: Mapping[str, nn.Parameter],
        held_out: Measured | None,
    ) -> tuple[DampingChoice, Attempt | None]:
        """The damping of a round and, where some were tried, the best try.

        The model is as before.
        """
        if not isinstance(self.damping, str):
            return DampingChoice(self.damping, []), None
        if held_out is None or fisher is None:
            return DampingChoice(1.0, []), None  # nothing that is used depends on it
        start = self.shelf.put("start", chosen)
        outcome: Outcome | None = None
        best: Attempt | None = None

        def prune_with(damping: float) -> None:
            nonlocal outcome
            restore(chosen, start, self.shelf)
            with warnings.catch_warnings():
                # Said for the damping that is taken, not for those that are tried.
                warnings.simplefilter("ignore", PrecisionWarning)
                outcome = self.step(model, fisher, masks, goal, damping)

        def measure() -> float:
            nonlocal best, outcome
            loss = held_out.mean_loss(model)
            if outcome is not None and (best is None or loss < best.loss):
                scores = self.shelf.put("scores", outcome.scores)
                weights = self.shelf.put("best", chosen)
                best = Attempt(replace(outcome, scores=scores), weights, loss)
            outcome = None  # its scores are gone before the next are made
            return loss

        try:
            return choose_damping(self.grid(fisher), prune_with, measure), best
        finally:
            restore(chosen, start, self.shelf)

    def entry(
        self,
        number: int,
        fisher: Statistics | None,
        choice: DampingChoice,
        outcome: Outcome,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """Return the history's line of a round."""
        return {
            "round": number,
            "sparsity": outcome.masks.sparsity,
            "samples": 0 if fisher is None else fisher.samples,
            "damping": choice.damping if self.needs_damping else None,
            "damping_evidence": choice.evidence,
            "predicted_increase": outcome.increase,
            "seconds": seconds,
            **({} if fisher is None or fisher.plan is None else _told(fisher.plan)),
        }

    def sign(self, masks: Masks, history: list[dict[str, Any]]) -> None:
        """Write into the masks how they came about."""
        masks.recipe.update(
            criterion=self.criterion,
            rounds=len(history),
            compensate=self.compensate,
            damping=[entry["damping"] for entry in history],
            samples=history[-1]["samples"],
            block_size=self.block_size,
            seed=self.seed,
        )


def _told(plan: MemoryPlan) -> dict[str, Any]:
    return {"memory_plan": plan.as_dict()}
