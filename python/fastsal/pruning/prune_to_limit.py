"""Prune to the highest sparsity within a limit on held-out images (see `limits.bound`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastsal.data.batches import Batches, Pair, as_batches
from fastsal.data.held_out import Holding, Repeated, limited
from fastsal.errors import InvalidArgument
from fastsal.pruning.damping import DampingChoice
from fastsal.pruning.history import Round
from fastsal.pruning.job import Job
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit, SafetyReport, trusted_until
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.shelf import restore
from fastsal.pruning.step import StepResult
from fastsal.utils.clock import Clock

if TYPE_CHECKING:
    from fastsal.fisher.statistics import Statistics

# One sample of so many is held out for the test of a limit.
_TESTED_EVERY = 4
# Sparsity at which the damping is chosen, as the final one is not known yet.
_TYPICAL_SPARSITY = 0.7
# Sparsities that are tested: coarse at first, finer where the loss usually rises. They are fixed,
# so that the order of the tests does not depend on the images.
GRID = tuple(
    round(s, 3) for s in (*np.arange(0.1, 0.5, 0.1), *np.arange(0.5, 0.96, 0.025), 0.97, 0.98, 0.99)
)
# Sparsities that are measured after the first one beyond the limit, for the curve only.
LOOK_AHEAD = 4


def prune_safely(
    job: Job, limit: Limit, held_out: Batches | None
) -> tuple[Masks, dict[str, Tensor], list[Round], SafetyReport]:
    """Prune to the highest sparsity within a limit.

    Statistics, the choice of the damping and the test use disjoint images; those for the damping
    are added to the statistics afterwards.

    Args:
        job: Model, images and recipe.
        limit: The limit.
        held_out: Images of the test; None holds out one sample in four.

    Returns:
        Masks, scores, history, and the report of the test.
    """
    recipe, step, clock = job.recipe, job.step, Clock()
    with job.all_or_nothing():
        fisher = None
        tested: list[Pair] = []
        held: list[Pair] = []
        source: Iterable[Pair] = Repeated(job.source)
        if held_out is not None:
            tested = list(as_batches(held_out, None))
        else:
            source = Holding(source.__iter__, tested, _TESTED_EVERY)
        if recipe.needs_fisher:
            if recipe.is_auto:
                source = Holding(source.__iter__, held)
            fisher = job.collect(source, recipe.seed)
        else:
            for _ in source:  # fills `tested`
                pass
        examination = job.examination(tested, limit, fisher)
        clock.lap("statistics")
        choice = DampingChoice(step.given_damping(fisher), [])
        if fisher is not None and recipe.is_auto:
            tuned = job.held_out(limited(held), fisher)
            choice, _ = step.choose_damping(fisher, None, _TYPICAL_SPARSITY, tuned)
        if fisher is not None and held:
            job.joining(fisher, held, recipe.seed + 1)()
        clock.lap("damping")
        result, report = _search(job, fisher, examination, choice.damping)
        clock.lap("search")
    history = [step.record(1, fisher, choice, result, clock.seconds)]
    recipe.sign(result.masks, history)
    result.masks.recipe["limit"] = vars(limit)
    return result.masks, result.scores, history, report


def _search(
    job: Job, fisher: Statistics | None, examination: Examination, damping: float
) -> tuple[StepResult, SafetyReport]:
    """Test sparsities in rising order, and prune to the last one within the limit."""
    recipe, process, model = job.recipe, job.process, job.model
    start = job.shelf.put("start", job.chosen)
    scores = process.score(model, fisher, recipe, None, damping)

    def prune_to(sparsity: float) -> tuple[Masks, float | None]:
        restore(job.chosen, start, job.shelf)
        masks = process.choose_masks(model, fisher, recipe, scores, sparsity, damping)
        predicted = job.step.compensate(fisher, masks, damping)
        masks.apply(model)
        return masks, predicted

    curve: list[dict[str, Any]] = []
    safe, is_open, left = 0.0, True, LOOK_AHEAD
    for sparsity in GRID:
        try:
            _, predicted = prune_to(sparsity)
        except InvalidArgument:
            break  # the floor allows no higher sparsity
        point = {"sparsity": sparsity, "predicted": predicted, **examination(model)}
        curve.append(point)
        is_open = is_open and point["keeps"]
        if is_open:
            safe = sparsity
        else:
            left -= 1
            if left == 0:
                break
    masks, predicted = prune_to(safe)
    report = SafetyReport(
        examination.limit, safe, examination.images, examination.cap, curve, trusted_until(curve)
    )
    return StepResult(scores, masks, predicted), report
