"""Prune to the highest sparsity that keeps a limit on held-out images (see `limits.bound`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastsal.data.batches import Batches, Pair, as_batches
from fastsal.data.held_out import Holding, Repeated, limited
from fastsal.errors import InvalidArgument
from fastsal.pruning.job import Job
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit, SafetyReport, trusted_until
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.shelf import restore
from fastsal.pruning.step import Outcome
from fastsal.utils.clock import Clock

if TYPE_CHECKING:
    from fastsal.fisher.statistics import Statistics

# One sample in so many is kept for the test of a limit.
_TESTED_EVERY = 4
# Where the damping is chosen when the sparsity is not known yet.
_TYPICAL_SPARSITY = 0.7


def prune_safely(
    job: Job, limit: Limit, held_out: Batches | None
) -> tuple[Masks, dict[str, Tensor], list[dict[str, Any]], SafetyReport]:
    """Prune with a limit: statistics, damping and test on images of their own.

    Args:
        job: Model, images and how.
        limit: What must not be passed.
        held_out: Images of the test; None keeps one sample in four for it.

    Returns:
        Masks, scores, history, and what was tested.
    """
    plan, model, clock = job.plan, job.model, Clock()
    with job.all_or_nothing():
        fisher = None
        tested: list[Pair] = []
        held: list[Pair] = []
        source: Iterable[Pair] = Repeated(job.source)
        if held_out is not None:
            tested = list(as_batches(held_out, None))
        else:
            source = Holding(source.__iter__, tested, _TESTED_EVERY)
        if plan.needs_fisher:
            if plan.is_auto:
                source = Holding(source.__iter__, held)
            fisher = job.collect(source, plan.seed)
        else:
            for _ in source:  # fills `tested`
                pass
        examination = job.examination(tested, limit, fisher)
        clock.lap("statistics")
        tuned = job.held_out(limited(held), fisher) if plan.is_auto else None
        choice, _ = plan.choose(model, fisher, None, _TYPICAL_SPARSITY, job.chosen, tuned)
        if fisher is not None and held:
            job.joining(fisher, held, plan.seed + 1)()
        clock.lap("damping")
        outcome, report = _search(job, fisher, examination, choice.damping)
        clock.lap("search")
    history = [plan.entry(1, fisher, choice, outcome, clock.seconds)]
    plan.sign(outcome.masks, history)
    outcome.masks.recipe["limit"] = vars(limit)
    return outcome.masks, outcome.scores, history, report


def _search(
    job: Job, fisher: Statistics | None, examination: Examination, damping: float
) -> tuple[Outcome, SafetyReport]:
    """Test sparsities in rising order; the model ends pruned to the last that kept the limit."""
    plan, model = job.plan, job.model
    start = plan.shelf.put("start", job.chosen)
    scores = plan.score(model, fisher, None, damping)

    def prune_to(sparsity: float) -> tuple[Masks, float | None]:
        restore(job.chosen, start, plan.shelf)
        masks = plan.rank(model, fisher, scores, sparsity, damping)
        predicted = plan.move(model, fisher, masks, damping)
        masks.apply(model)
        return masks, predicted

    curve: list[dict[str, Any]] = []
    safe, is_open, left = 0.0, True, LOOK_AHEAD
    for sparsity in GRID:
        try:
            _, predicted = prune_to(sparsity)
        except InvalidArgument:
            break  # the floor leaves no more to prune
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
    return Outcome(scores, masks, predicted), report


# Coarse where nothing is at stake, fine where it is. Fixed beforehand: the order may not depend on
# the images.
GRID = tuple(
    round(s, 3) for s in (*np.arange(0.1, 0.5, 0.1), *np.arange(0.5, 0.96, 0.025), 0.97, 0.98, 0.99)
)


# Measured past the first failure, for the curve only.
LOOK_AHEAD = 4
