"""Pruning in rounds: statistics at the weights as they are, a step, and again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fastsal.checkpoint import Checkpoint
from fastsal.damping import HeldOut
from fastsal.errors import InvalidArgument
from fastsal.holdout import Pair, holding_out, limited
from fastsal.masks import Masks
from fastsal.plan import Job, restore
from fastsal.recalibration import recalibrate_if_better


def prune_in_rounds(
    job: Job,
    goals: Sequence[float | None],
    *,
    recalibrate: bool,
    checkpoint: Checkpoint | None = None,
) -> tuple[Masks, dict[str, Tensor], list[dict[str, Any]]]:
    """Prune to each goal in turn; what is pruned stays pruned.

    Args:
        job: Model, images and how.
        goals: Sparsity after each round; None where a pattern fixes it.
        recalibrate: Whether batch normalisation is recalibrated at the end, where that helps.
        checkpoint: Where the state after each round is kept, and taken up again.

    Returns:
        Masks, scores of the last round, history.
    """
    plan, model = job.plan, job.model
    masks: Masks | None = None
    history: list[dict[str, Any]] = []
    scores: dict[str, Tensor] = {}
    tuned: HeldOut | None = None
    with job.all_or_nothing() as original:
        if checkpoint is not None:
            masks, history = checkpoint.resume(job.chosen, original)
        for number, goal in list(enumerate(goals, start=1))[len(history) :]:
            clock = Clock()
            fisher = rest = tuned = None
            if plan.needs_fisher and job.batches is not None:
                held: list[Pair] = []
                source = job.source()
                if plan.is_auto or recalibrate:
                    source = holding_out(source, held)
                fisher = job.collect(source, plan.seed + number - 1)
                if plan.is_auto or recalibrate:
                    some = limited(held)
                    # Before they are used, as this checks them.
                    rest = job.collect(held, plan.seed + len(goals) + number, quiet=True)
                    tuned = HeldOut.of(model, some, job.loss)
            clock.lap("statistics")
            choice, best = plan.choose(model, fisher, masks, goal, job.chosen, tuned)
            clock.lap("damping")
            if fisher is not None and rest is not None:
                fisher.merge(rest)
            outcome = plan.step(model, fisher, masks, goal, choice.damping)
            has_joined = True
            if best is not None and tuned is not None and tuned.mean_loss(model) > best.loss:
                has_joined = False
                restore(job.chosen, best.weights)
                outcome = best.outcome
            scores, masks = outcome.scores, outcome.masks
            clock.lap("prune")
            entry = plan.entry(number, fisher, choice, outcome, clock.laps)
            history.append(entry | {"held_out_joined": has_joined} if plan.is_auto else entry)
            if checkpoint is not None and number < len(goals):
                checkpoint.save(job.chosen, masks, history)
        if recalibrate and tuned is not None:
            clock = Clock()
            measured = partial(tuned.mean_loss, model)
            source = holding_out(job.source(), [])
            history[-1]["recalibration"] = recalibrate_if_better(model, source, measured)
            clock.lap("recalibration")
            history[-1]["seconds"].update(clock.laps)
    if masks is None:
        raise InvalidArgument("rounds: takes 1 or more")
    plan.sign(masks, history)
    if checkpoint is not None:
        checkpoint.remove()
    return masks, scores, history


def rising_goals(sparsity: float | None, rounds: int) -> list[float | None]:
    """The sparsity after each round; the last one is exactly what was asked for."""
    if sparsity is None:
        return [None] * rounds
    rising = [1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)]
    return [*rising, sparsity]


class Clock:
    """Seconds of named steps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a step that began with the last lap."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
