"""Prune to the highest sparsity that keeps a limit on held-out images (see `fastsal.safety`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsal.batches import Batches, as_batches
from fastsal.criteria import score
from fastsal.damping import loss_of_guessing, outputs
from fastsal.errors import DataError, InvalidArgument
from fastsal.holdout import Holding, Pair, Repeated, limited
from fastsal.masks import Masks
from fastsal.passes import in_micro_batches
from fastsal.plan import Job, Outcome, compensate_with, restore
from fastsal.ranking import rank
from fastsal.rounds import Clock
from fastsal.safety import (
    GRID,
    LOOK_AHEAD,
    Limit,
    SafetyReport,
    differences,
    is_below,
    losses_of,
    trusted_until,
    upper_bound,
)

if TYPE_CHECKING:
    from fastsal.fisher import BlockFisher

LossFunction = Callable[[Tensor, Tensor], Tensor]

# One sample in so many is kept for the test of a limit.
_TESTED_EVERY = 4
# Where the damping is chosen when the sparsity is not known yet.
_TYPICAL_SPARSITY = 0.7


class Examination:
    """The dense model's answers on the test images, and how far a pruned one is from them."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Pair],
        limit: Limit,
        loss: LossFunction,
    ) -> None:
        self.limit = limit
        self._loss = loss
        self._batches: list[tuple[Tensor, Tensor]] = []
        for images, labels in batches:
            if labels is None:
                raise DataError("labels: are missing; a limit is tested on labelled images")
            self._batches.append((images, labels))
        if not self._batches:
            raise InvalidArgument("samples: none are left to test the limit on; takes more")
        self._dense = [outputs(model, images).cpu() for images, _ in self._batches]
        self._losses = [
            losses_of(loss, dense, labels.cpu())
            for dense, (_, labels) in zip(self._dense, self._batches, strict=True)
        ]
        self.images = sum(len(out) for out in self._dense)
        self.cap = loss_of_guessing(self._dense[0]) if limit.kind == "loss" else None

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Measure a pruned model."""
        increases, rises = [], []
        known = zip(self._batches, self._dense, self._losses, strict=True)
        for (images, labels), dense, losses in known:
            out, target = outputs(model, images).cpu(), labels.cpu()
            both = losses, losses_of(self._loss, out, target)
            values, low, high = differences(self.limit, dense, out, both, target)
            increases.append(values)
            rises.append((both[1] - both[0]).double())
        each, rise = torch.cat(increases), torch.cat(rises)
        confidence = self.limit.confidence
        return {
            "increase": float(each.mean()),
            "upper": upper_bound(each.numpy(), low, high, confidence),
            "keeps": is_below(each.numpy(), self.limit.most, low, high, confidence),
            "loss_increase": float(rise.mean()),
            "loss_error": float(rise.std(correction=0)) / len(rise) ** 0.5,
        }


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
        if fisher is not None and fisher._plan is not None:
            size = fisher._plan.micro_batch
            tested = list(in_micro_batches(tested, size, size))
        examination = Examination(model, tested, limit, job.loss)
        clock.lap("statistics")
        tuned = job.held_out(limited(held), fisher) if plan.is_auto else None
        choice, _ = plan.choose(model, fisher, None, _TYPICAL_SPARSITY, job.chosen, tuned)
        if fisher is not None and held:
            job.joining(fisher, held, plan.seed + 1)()
        clock.lap("damping")
        outcome, report = _search(job, fisher, examination, choice.damping)
        clock.lap("search")
    history = [plan.entry(1, fisher, choice, outcome, clock.laps)]
    plan.sign(outcome.masks, history)
    outcome.masks.recipe["limit"] = vars(limit)
    return outcome.masks, outcome.scores, history, report


def _search(
    job: Job, fisher: BlockFisher | None, examination: Examination, damping: float
) -> tuple[Outcome, SafetyReport]:
    """Test sparsities in rising order; the model ends pruned to the last that kept the limit."""
    plan, model = job.plan, job.model
    start = plan.shelf.put("start", job.chosen)
    names = None if fisher is not None else list(job.chosen)
    scores = score(model, fisher, plan.criterion, damping, parameters=names, seed=plan.seed)

    def prune_to(sparsity: float) -> tuple[Masks, float | None]:
        restore(job.chosen, start, plan.shelf)
        masks = rank(scores, sparsity, **plan.ranking)
        predicted = None
        if plan.compensate and fisher is not None:
            predicted = compensate_with(plan.shelf, model, fisher, masks, damping)
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
