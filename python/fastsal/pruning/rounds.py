"""Pruning in rounds: statistics at the current weights, then one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from fastsal.data.held_out import HeldOutSamples, Repeated, require_some
from fastsal.errors import InvalidArgument
from fastsal.fisher.statistics import Statistics
from fastsal.pruning.checkpoint import Checkpoint, RoundState
from fastsal.pruning.damping import DampingChoice
from fastsal.pruning.history import Round
from fastsal.pruning.job import Job
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.shares import Sparsity
from fastsal.pruning.measured import Measured
from fastsal.pruning.recalibration import loss_if_recalibrated, recalibrate_if_better
from fastsal.pruning.shelf import restore
from fastsal.pruning.step import Attempt
from fastsal.utils.clock import Clock


@dataclass(frozen=True)
class RoundStatistics:
    """The statistics of a round.

    Attributes:
        fisher: Statistics of the images that are not held out; None where none are needed.
        joined: Returns the statistics of all images; those of `fisher` where none are held out.
        tuned: The held-out images, on which the loss is measured; None where none are held out.
        held: These images.
        recalibrates: Whether batch normalization is recalibrated in the end.
    """

    fisher: Statistics | None = None
    joined: Callable[[], Statistics | None] = lambda: None
    tuned: Measured | None = None
    held: HeldOutSamples | None = None
    recalibrates: bool = False

    def without_statistics(self) -> RoundStatistics:
        """Return the held-out images alone, so that the memory of statistics is free."""
        return replace(
            RoundStatistics(), tuned=self.tuned, held=self.held, recalibrates=self.recalibrates
        )

    def keeps(self, model: nn.Module, best: Attempt | None) -> bool:
        """Return whether the model is no worse than the best attempt."""
        return best is None or self.loss(model) <= best.loss

    def loss(self, model: nn.Module) -> float:
        """Return the held-out loss that candidates are compared by; zero without such images."""
        if self.tuned is None:
            return 0.0
        loss = partial(self.tuned.mean_loss, model)
        if not self.recalibrates or self.held is None:
            return loss()
        return loss_if_recalibrated(model, self.held, loss)


class StatisticsSource(Protocol):
    """Returns the statistics of a round, by its number from 1."""

    def __call__(self, number: int, *, holds_out: bool) -> RoundStatistics:
        """Return the statistics, with some images held out or none."""


def find_statistics(job: Job, rounds: int, number: int, *, holds_out: bool) -> RoundStatistics:
    """Collect a job's statistics for one round, with some images held out or none."""
    recipe = job.recipe
    if not recipe.needs_fisher or job.batches is None:
        return RoundStatistics()
    seed = recipe.seed + number - 1
    if not holds_out:
        fisher = job.collect(job.source(), seed)
        return RoundStatistics(fisher, lambda: fisher)
    held = job.tuning_samples(job.source(), job.total)
    fisher = job.collect(held.others, seed)
    require_some(held)
    # Collection validates the held-out images, so it comes before they are used.
    join = job.joining(fisher, held, recipe.seed + rounds + number)

    def joined() -> Statistics:
        join()  # in place: the statistics without them are not needed any more
        return fisher

    return RoundStatistics(fisher, joined, job.held_out(held, fisher), held)


def prune_in_rounds(
    job: Job,
    goals: Sequence[Sparsity | None],
    *,
    dense: Mapping[str, Tensor],
    recalibrate: bool,
    checkpoint: Checkpoint | None = None,
    find: StatisticsSource | None = None,
) -> tuple[Masks, dict[str, Tensor], list[Round]]:
    """Prune to each goal in turn; pruned weights remain pruned. On error nothing is restored.

    With `damping="auto"`, `λ` is chosen once, before the first round, by attempts at the last goal:
    in the small steps of single rounds, candidates differ by less than the noise of the held-out
    loss, and the scale of gradients (and so of candidates) grows with the damage.

    Args:
        job: Model, images and recipe.
        goals: Sparsity after each round; None where a pattern fixes it.
        dense: Copies of the tensors that the job may change, from `Job.all_or_nothing`.
        recalibrate: Whether batch normalization is recalibrated at the end, where that lowers the
            held-out loss.
        checkpoint: File with the state after each round, from which a rerun resumes.
        find: Returns the statistics of a round at the current weights; None collects them from the
            images of the job.

    Returns:
        Masks, scores of the last round, history.
    """
    recipe, model, step = job.recipe, job.model, job.step
    # Statistics that are shared, or not needed, come without their held-out images.
    needs_own = job.reconstruction is not None and (find is not None or not recipe.needs_fisher)
    own = _held_out_apart(job) if needs_own else RoundStatistics()
    find = find or partial(find_statistics, job, len(goals))
    masks: Masks | None = None
    history: list[Round] = []
    scores: dict[str, Tensor] = {}
    found = RoundStatistics()
    if checkpoint is not None:
        masks, history, scores = _resumed(job, checkpoint, len(goals))
    for number, goal in list(enumerate(goals, start=1))[len(history) :]:
        clock = Clock()
        chooses = recipe.is_auto and not history
        # Frees statistics and scores of the previous round.
        found, fisher, scores = RoundStatistics(), None, {}
        is_last = number == len(goals)
        refits = job.refit is not None and (is_last or job.refit.settings.between_rounds)
        holds_out = chooses or refits or (recalibrate and is_last)
        holds_out = holds_out or job.reconstruction is not None
        found = replace(find(number, holds_out=holds_out), recalibrates=recalibrate)
        clock.lap("statistics")
        choice, best = _chosen_damping(job, found, masks, goals[-1], history)
        clock.lap("damping")
        fisher = found.joined()
        choice = choice or DampingChoice(step.given_damping(fisher), [])
        result = step.run(fisher, masks, goal, choice.damping)
        joined = len(goals) > 1 or found.keeps(model, best)
        if best is not None and not joined:
            restore(job.chosen, best.weights, job.shelf)
            result = best.result
        scores, masks = result.scores, result.masks
        clock.lap("prune")
        entry = step.record(number, fisher, choice, result, clock.seconds)
        history.append(replace(entry, held_out_joined=joined) if chooses else entry)
        del result, best  # they refer to scores
        found, fisher = found.without_statistics(), None
        judged = found if found.held is not None else replace(own, recalibrates=recalibrate)
        history[-1] = _reconstructed(job, judged, masks, dense, history[-1], is_last=is_last)
        if recalibrate and is_last:
            history[-1] = _recalibrated(job, found, history[-1])
        if refits:
            _save(checkpoint, job, RoundState(masks, history, scores))
            history[-1] = _refitted(job, found, masks, history[-1], checkpoint)
        if not is_last:
            _save(checkpoint, job, RoundState(masks, history))
    if masks is None:
        raise InvalidArgument("rounds must be at least 1, got 0")
    recipe.sign(masks, history, refit=job.refit and job.refit.settings.as_dict())
    if checkpoint is not None:
        checkpoint.remove()
    return masks, scores, history


def _save(checkpoint: Checkpoint | None, job: Job, state: RoundState) -> None:
    """Write the state after a round, or before its refit, if asked for."""
    if checkpoint is not None:
        checkpoint.save(job.changed, state)


def _resumed(
    job: Job, checkpoint: Checkpoint, rounds: int
) -> tuple[Masks | None, list[Round], dict[str, Tensor]]:
    """Return masks, history and scores of a checkpoint; a refit that it stopped at is finished."""
    found = checkpoint.resume(job.changed, job.images, job.chosen)
    masks, history = found.masks, found.history
    if masks is None or found.scores is None:
        return masks, history, {}
    history[-1] = _refitted(job, RoundStatistics(), masks, history[-1], checkpoint)
    if len(history) < rounds:
        checkpoint.save(job.changed, RoundState(masks, history))
    return masks, history, dict(found.scores)


def _chosen_damping(
    job: Job,
    found: RoundStatistics,
    masks: Masks | None,
    goal: Sparsity | None,
    history: Sequence[Round],
) -> tuple[DampingChoice | None, Attempt | None]:
    """Return the damping of the recipe or of the first round, and the best attempt of the latter.

    None is left to the recipe.
    """
    if not job.recipe.is_auto:
        return None, None
    if history:
        first = history[0].damping
        return (None if first is None else DampingChoice(first, [])), None
    if found.fisher is None or found.tuned is None:
        return None, None
    return job.step.choose_damping(found.fisher, masks, goal, partial(found.loss, job.model))


def _held_out_apart(job: Job) -> RoundStatistics:
    """Hold out images of a job, whose model is dense now."""
    held = job.tuning_samples(job.source(), job.total)
    require_some(held)
    return RoundStatistics(tuned=job.held_out(held), held=held)


def _reconstructed(
    job: Job,
    found: RoundStatistics,
    masks: Masks,
    dense: Mapping[str, Tensor],
    entry: Round,
    *,
    is_last: bool,
) -> Round:
    """Reconstruct the model if that lowers the held-out loss; return the entry with the effect."""
    if job.reconstruction is None or found.tuned is None or found.held is None:
        return entry
    clock = Clock()
    effect = job.reconstruction.run(
        job.model,
        job.changed,
        dense,
        masks,
        found.held.without(job.source()),
        partial(found.loss, job.model),
        job.shelf,
        is_last=is_last,
    )
    clock.lap("reconstruction")
    return replace(entry, reconstruction=effect, seconds=entry.seconds | clock.seconds)


def _recalibrated(job: Job, found: RoundStatistics, entry: Round) -> Round:
    """Recalibrate the model if that lowers the held-out loss; return the entry with the effect."""
    if found.tuned is None or found.held is None:
        return entry
    clock = Clock()
    measured = partial(found.tuned.mean_loss, job.model)
    effect = recalibrate_if_better(job.model, found.held.without(job.source()), measured)
    clock.lap("recalibration")
    return replace(entry, recalibration=effect, seconds=entry.seconds | clock.seconds)


def _refitted(
    job: Job, found: RoundStatistics, masks: Masks, entry: Round, checkpoint: Checkpoint | None
) -> Round:
    """Refit the model to its dense copy; return the entry with what that did."""
    if job.refit is None:
        return entry
    clock = Clock()
    # Without statistics nothing is held out yet.
    held = found.held or job.tuning_samples(job.source(), job.total)
    require_some(held)
    source = Repeated(lambda: held.without(job.source()))
    file = None if checkpoint is None else checkpoint.of_refit
    done = job.refit.run(job.model, source, held, masks, file)
    clock.lap("refit")
    return replace(entry, refit=done, seconds=entry.seconds | clock.seconds)


def rising_goals(sparsity: Sparsity | None, rounds: int) -> Sequence[Sparsity | None]:
    """Return the sparsity after each round; the last one is `sparsity`, exactly."""
    if sparsity is None:
        return [None] * rounds
    if isinstance(sparsity, Mapping):
        each = {pattern: _rising(part, rounds) for pattern, part in sparsity.items()}
        return [{pattern: goals[r] for pattern, goals in each.items()} for r in range(rounds)]
    return _rising(sparsity, rounds)


def _rising(sparsity: float, rounds: int) -> list[float]:
    return [*(1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)), sparsity]
