"""Prune to the highest sparsity within a limit on held-out images (see `limits.bound`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastsal.data.batches import Batches, Pair, Source, as_batches
from fastsal.data.held_out import HeldOutSamples, require_some
from fastsal.errors import DataError, InvalidArgument
from fastsal.gradients.losses import check_images
from fastsal.models.evaluating import outputs
from fastsal.pruning.damping import DampingChoice
from fastsal.pruning.history import Round
from fastsal.pruning.job import Job
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import TESTED_EVERY, Limit, SafetyReport, trusted_until
from fastsal.pruning.limits.values import settled
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.shelf import restore
from fastsal.pruning.step import StepResult
from fastsal.utils.clock import Clock

if TYPE_CHECKING:
    from fastsal.fisher.statistics import Statistics

# Bytes of test images that are kept in memory without a memory budget, if all of them fit.
_ROOM = 2**30
# Sparsity at which the damping is chosen, as the final one is not known yet.
_TYPICAL_SPARSITY = 0.7
# Sparsities that are tested: coarse at first, finer where the loss usually rises. They are fixed,
# so that the order of the tests does not depend on the images.
GRID: tuple[float, ...] = (
    *(0.1, 0.2, 0.3, 0.4),
    *(0.5, 0.525, 0.55, 0.575, 0.6, 0.625, 0.65, 0.675, 0.7, 0.725),
    *(0.75, 0.775, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95),
    *(0.97, 0.98, 0.99),
)
# Sparsities that are measured after the first one beyond the limit, for the curve only.
LOOK_AHEAD = 4


def prune_safely(
    job: Job, limit: Limit, held_out: Batches | None
) -> tuple[Masks, dict[str, Tensor], list[Round], SafetyReport]:
    """Prune to the highest sparsity within a limit. On error nothing is restored.

    Statistics, the choice of the damping and the test use disjoint images; those for the damping
    are added to the statistics afterwards.

    Args:
        job: Model, images and recipe.
        limit: The limit.
        held_out: Images of the test; None holds out one sample in four.

    Returns:
        Masks, scores, history, and the report of the test.
    """
    limit, job, held_out = _checked(limit, job, held_out)
    recipe, step, clock = job.recipe, job.step, Clock()
    fisher = None
    source, total = job.source(), job.total
    if held_out is not None:
        tested = _tested(job, Source(held_out, None, name="held_out"), 1)
    else:
        tested = _tested(job, source, TESTED_EVERY, total)
        source = tested.others
        total = None if total is None else total - tested.count_of(total)
    held: HeldOutSamples | None = None
    if recipe.needs_fisher:
        if recipe.is_auto:
            held = job.tuning_samples(source, total)
            source = held.others
        fisher = job.collect(source, recipe.seed)
    examination = job.examination(tested, limit, fisher)
    clock.lap("statistics")
    choice = DampingChoice(step.given_damping(fisher), [])
    if fisher is not None and held is not None:
        require_some(held)
        tuned = job.held_out(held, fisher)
        choice, _ = step.choose_damping(
            fisher, None, _TYPICAL_SPARSITY, partial(tuned.mean_loss, job.model)
        )
        job.joining(fisher, held, recipe.seed + 1)()
    clock.lap("damping")
    result, report = _search(job, fisher, examination, choice.damping)
    clock.lap("search")
    history = [step.record(1, fisher, choice, result, clock.seconds)]
    recipe.sign(result.masks, history)
    result.masks.recipe["limit"] = limit.as_dict()
    return result.masks, result.scores, history, report


def _tested(
    job: Job, source: Iterable[Pair], every: int, total: int | None = None
) -> HeldOutSamples:
    """Return the images that a limit is tested on: of a source, one in so many.

    `total` is the number of images of the job, if they are the source.
    """
    room = None
    if not isinstance(source, Source) or source.repeats:
        room = _ROOM if job.statistics.get("memory_budget") is None else 0
    pick = None if total is None else job.pick(source)
    return HeldOutSamples(
        source.__iter__, every, seed=job.recipe.seed, total=total, room=room, pick=pick
    )


def _checked(limit: Limit, job: Job, held_out: Batches | None) -> tuple[Limit, Job, Batches | None]:
    """Check a limit on a few images; returns it with its cap, and all images again.

    Raises:
        InvalidArgument: The limit has no meaning for the outputs of the model.
        DataError: The images have no labels, or labels that are not classes of the model.
    """
    given = job.batches if held_out is None else held_out
    first = list(itertools.islice(() if given is None else given, 1))
    if isinstance(given, Iterator):
        given = itertools.chain(first, given)
    if held_out is None:
        job = replace(job, batches=given)
    else:
        held_out = given
    images, labels = next(as_batches(first, None, "optional"))
    if labels is None:
        raise DataError("labels must not be None: a limit is tested on labeled images")
    check_images(images)
    out = outputs(job.model, images[:2])
    labels = labels[:2].to(next(job.model.parameters()).device)
    return settled(limit, job.loss, out, labels), job, held_out


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
        limit=examination.limit,
        sparsity=safe,
        images=examination.images,
        capped_at=examination.limit.cap,
        curve=curve,
        trusted_until=trusted_until(curve),
        seed=examination.seed,
    )
    return StepResult(scores, masks, predicted), report
