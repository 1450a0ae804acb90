"""Pruning in rounds: statistics at the weights as they are, a step, and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.data.held_out import Holding, Repeated, holding_out, limited
from fastsal.errors import InvalidArgument
from fastsal.fisher.statistics import Statistics
from fastsal.pruning.checkpoint import Checkpoint
from fastsal.pruning.damping import DampingChoice
from fastsal.pruning.job import Job
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.measured import Measured
from fastsal.pruning.recalibration import recalibrate_if_better
from fastsal.pruning.shelf import restore
from fastsal.pruning.step import Attempt
from fastsal.utils.clock import Clock


@dataclass(frozen=True)
class Found:
    """Statistics of a round.

    Attributes:
        fisher: Of the images that are not held out; None where none are needed.
        joined: Of all images; gives the same as `fisher` where none are held out.
        tuned: Those that are, to measure on.
    """

    fisher: Statistics | None = None
    joined: Callable[[], Statistics | None] = lambda: None
    tuned: Measured | None = None

    def keeps(self, model: nn.Module, best: Attempt | None) -> bool:
        """Whether the model is no worse than the best that was tried."""
        return best is None or self.tuned is None or self.tuned.mean_loss(model) <= best.loss


class Finder(Protocol):
    """Gives the statistics of a round, by its number from 1."""

    def __call__(self, number: int, *, holds_out: bool) -> Found:
        """With some images held out, or none."""


def find_statistics(job: Job, rounds: int, number: int, *, holds_out: bool) -> Found:
    """Collect a job's statistics for one round, with some images held out or none."""
    plan = job.plan
    if not plan.needs_fisher or job.batches is None:
        return Found()
    seed = plan.seed + number - 1
    if not holds_out:
        fisher = job.collect(Repeated(job.source), seed)
        return Found(fisher, lambda: fisher)
    held: list[Pair] = []
    fisher = job.collect(Holding(job.source, held), seed)
    some = limited(held)
    # Before they are used, as this checks them.
    join = job.joining(fisher, held, plan.seed + rounds + number)

    def joined() -> Statistics:
        # In place: what was held out is of use for nothing else.
        join()
        return fisher

    return Found(fisher, joined, job.held_out(some, fisher))


def prune_in_rounds(
    job: Job,
    goals: Sequence[float | None],
    *,
    recalibrate: bool,
    checkpoint: Checkpoint | None = None,
    find: Finder | None = None,
) -> tuple[Masks, dict[str, Tensor], list[dict[str, Any]]]:
    """Prune to each goal in turn; what is pruned stays pruned.

    A `λ` that is to be chosen is chosen once, before the first round, by steps to the last goal: in
    the small steps of rounds the candidates differ by less than the noise of the held-out loss, and
    gradients grow with the damage, so that the scale of the candidates would too.

    Args:
        job: Model, images and how.
        goals: Sparsity after each round; None where a pattern fixes it.
        recalibrate: Whether batch normalisation is recalibrated at the end, where that helps.
        checkpoint: Where the state after each round is kept, and taken up again.
        find: Gives the statistics of a round at the weights as they are, by its number; None
            collects them from the job's images.

    Returns:
        Masks, scores of the last round, history.
    """
    plan, model = job.plan, job.model
    find = find or partial(find_statistics, job, len(goals))
    masks: Masks | None = None
    history: list[dict[str, Any]] = []
    scores: dict[str, Tensor] = {}
    found = Found()
    with job.all_or_nothing():
        if checkpoint is not None:
            masks, history = checkpoint.resume(job.chosen)
        for number, goal in list(enumerate(goals, start=1))[len(history) :]:
            clock = Clock()
            chooses = plan.is_auto and not history
            # Statistics and scores of two rounds need not be there at once.
            found, fisher, scores = Found(), None, {}
            found = find(number, holds_out=chooses or (recalibrate and number == len(goals)))
            clock.lap("statistics")
            best: Attempt | None = None
            if plan.is_auto and history:
                choice = DampingChoice(history[0]["damping"], [])
            else:
                choice, best = plan.choose(
                    model, found.fisher, masks, goals[-1], job.chosen, found.tuned
                )
            clock.lap("damping")
            fisher = found.joined()
            outcome = plan.step(model, fisher, masks, goal, choice.damping)
            joined = len(goals) > 1 or found.keeps(model, best)
            if best is not None and not joined:
                restore(job.chosen, best.weights, plan.shelf)
                outcome = best.outcome
            scores, masks = outcome.scores, outcome.masks
            clock.lap("prune")
            entry = plan.entry(number, fisher, choice, outcome, clock.seconds)
            history.append(entry | {"held_out_joined": joined} if chooses else entry)
            del outcome, best  # they hold scores
            if checkpoint is not None and number < len(goals):
                checkpoint.save(job.chosen, masks, history)
        if recalibrate and found.tuned is not None:
            clock = Clock()
            measured = partial(found.tuned.mean_loss, model)
            source = holding_out(job.source(), [])
            history[-1]["recalibration"] = recalibrate_if_better(model, source, measured)
            clock.lap("recalibration")
            history[-1]["seconds"].update(clock.seconds)
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
