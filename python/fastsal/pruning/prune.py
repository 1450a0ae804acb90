"""Prune a model: statistics, scores, masks and compensation, in one round or several."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches, as_batches, check_samples
from fastsal.errors import InvalidArgument
from fastsal.fisher.memory_plan import Use
from fastsal.gradients import select_parameters
from fastsal.gradients.feature_parameters import without_classifier
from fastsal.gradients.losses import LossFunction, resolve_loss
from fastsal.pruning.checkpoint import Checkpoint
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.criteria.scoring import find_criterion
from fastsal.pruning.job import Job
from fastsal.pruning.limits.limit import Limit, SafetyReport
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.ranking import check_ranking
from fastsal.pruning.memory_use import use_by_pruning
from fastsal.pruning.prune_to_limit import prune_safely
from fastsal.pruning.rounds import prune_in_rounds, rising_goals
from fastsal.pruning.shelf import Shelf, copies
from fastsal.pruning.step import Plan
from fastsal.utils.choices import Curvature


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did.

    Attributes:
        masks: True = kept; the model is zero elsewhere.
        scores: The scores of the last round, name to float32.
        history: One entry a round: `round`, `sparsity` reached, `samples`, `damping`,
            `damping_evidence` (pairs of λ and held-out loss), `held_out_joined` (see `damping`),
            `predicted_increase` of the loss (with compensation), `seconds` of each step and, with
            `memory_budget`, the `memory_plan` (`fastsal.MemoryPlan`) that was followed; the
            last one has `recalibration`, if that was asked for: held-out loss `before` and `after`,
            and whether it was `kept`.
        safety: With `max_loss_increase` or `max_accuracy_drop`: what was tested.
    """

    masks: Masks
    scores: dict[str, Tensor]
    history: list[dict[str, Any]] = field(default_factory=list)
    safety: SafetyReport | None = None


@dataclass(frozen=True)
class Makers:
    """What a pruning is made of; jobs of several ranks have their own.

    Attributes:
        plan: Makes a `Plan`.
        job: Makes a `Job`.
        checkpoint: Makes a `Checkpoint`.
        use: Says what is kept beside statistics, as `use_by_pruning`.
    """

    plan: Callable[..., Plan] = Plan
    job: Callable[..., Job] = Job
    checkpoint: Callable[..., Checkpoint] = Checkpoint
    use: Callable[..., Use] = use_by_pruning


def prune(
    model: nn.Module,
    batches: Batches | None,
    sparsity: float | None = None,
    *,
    criterion: str = "obs-greedy",
    rounds: int = 1,
    compensate: bool = True,
    damping: float | str = "auto",
    samples: int | None = None,
    block_size: int | None = 64,
    scope: str = "global",
    pattern: str | None = None,
    floor: float = 0.0,
    loss: str | LossFunction = "cross-entropy",
    curvature: Curvature = "empirical",
    parameters: str | Sequence[str] | None = None,
    precision: str = "float32",
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
    loss_scale: float | None = None,
    memory_budget: int | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    scratch_budget: int | str | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    seed: int = 0,
    max_loss_increase: float | None = None,
    max_accuracy_drop: float | None = None,
    confidence: float = 0.95,
    held_out: Batches | None = None,
    recalibrate: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    _makers: Makers | None = None,
) -> PruneResult:
    """Prune a model in place.

    Each of `rounds` rounds collects statistics at the weights as they are, scores, ranks to the
    sparsity `1 - (1 - sparsity)^(r / rounds)`, masks, and (with `compensate`) moves the kept
    weights. Pruned weights stay pruned and take no part in later rounds.

    Args:
        model: Put into evaluation mode for the passes and left in its own modes.
        batches: As for `collect`; with several rounds something that can be iterated again. None
            is enough for `"magnitude"` and `"random"` without compensation.
        sparsity: Fraction of the weights that goes, in `[0, 1]`.
        criterion: One of `CRITERIA`.
        rounds: Rounds, 1 or more.
        compensate: Whether kept weights move to make up for the pruned ones.
        damping: `λ`, or `"auto"`: one sample in eight is held out, and the λ that leaves the least
            loss on them is taken, a cross-entropy counting at most what guessing costs. They join
            the statistics then; where that makes the loss worse, the pruned model that was measured
            without them stays. With several rounds it is chosen once, by steps to the last goal.
        samples: Samples of each round; None takes all.
        block_size: As for `collect`.
        scope: As for `rank`; so are `pattern` and `floor`.
        pattern: `"N:M"` or `"1xM"`, one round only; with a second-order criterion weights are
            chosen by joint costs (`rank_pattern`), M up to 8.
        floor: Least kept fraction of any parameter.
        loss: As for `collect`; so are all that follow.
        curvature: `"empirical"`, `"sampled"` or `"features"`. With the last, batches need no labels
            and the model no classifier (its weights are not pruned unless they are named exactly),
            and the held-out loss is that of matching the dense model's features,
            `½ ‖f_θ(x) − f(x)‖² / F`, an image counting at most what the mean feature costs as a
            guess.
        parameters: Names or patterns.
        precision: Of the sums.
        micro_batch: Samples of one pass.
        autocast: Type of the passes.
        loss_scale: As for `collect`.
        memory_budget: Bytes that all this may add to the process, or text as `"8GiB"`: statistics
            and passes as for `collect`, scores, masks, and copies of weights.
        scratch: A folder for the statistics and copies that the budget has no room for. Without
            one statistics that do not fit are collected again for each use, and take no disk but
            several times as long: `plan_memory` says how long.
        scratch_budget: Bytes that the statistics may take there.
        progress: A bar, or a function.
        seed: Of everything with chance in it.
        max_loss_increase: Instead of `sparsity`: prune to the highest that keeps the rise of the
            mean loss below this on images that were held out (the loss of an image counts
            at most what guessing costs). One round, no pattern.
        max_accuracy_drop: The same for top-1 accuracy, a fraction.
        confidence: Of that promise.
        held_out: Labelled images to test the limit on; None holds one sample in four out. The
            promise is about images like these: give some that the model was not trained on.
        recalibrate: Whether running moments of batch normalisation are averaged over the images
            again at the end; taken back unless the held-out loss is lower for it. Holds one sample
            in eight out, as `damping="auto"` does.
        checkpoint: A file that keeps the state between rounds: the same call goes on from there.

    Returns:
        Masks, scores and history.

    Raises:
        InvalidArgument: An argument is not taken. In this and in every other case the model is
            as it was.
        DataError, NonFiniteGradient, UnknownParameter, UnsupportedLayer: As `collect`.
        FactorizationError: A block cannot be factored with this damping.
        FileFormatError: `checkpoint` is damaged, or of another run.
    """
    makers = _makers or Makers()
    entry = CRITERIA[find_criterion(criterion)]
    plan = makers.plan(
        criterion=criterion,
        needs_fisher=entry.needs_fisher or compensate,
        needs_damping=entry.needs_damping or compensate,
        compensate=compensate,
        damping=damping,
        ranking={"scope": scope, "pattern": pattern, "floor": floor},
        parameters=parameters,
        block_size=block_size,
        seed=seed,
        shelf=Shelf(scratch),
    )
    plan.check(rounds, batches, recalibrate=recalibrate)
    check_samples(samples)
    chosen = select_parameters(model, parameters)
    if curvature == "features":
        images, batches = _first_images(batches, samples)
        chosen = without_classifier(model, chosen, parameters, images)
        parameters = list(chosen)
        plan = replace(plan, parameters=parameters)
    statistics: dict[str, Any] = {
        "block_size": block_size,
        "loss": loss,
        "curvature": curvature,
        "parameters": parameters,
        "precision": precision,
        "micro_batch": micro_batch,
        "autocast": autocast,
        "loss_scale": loss_scale,
        "progress": progress,
        "by_rows": pattern is not None,
    }
    if memory_budget is not None:
        statistics |= {
            "memory_budget": memory_budget,
            "scratch": scratch,
            "scratch_budget": scratch_budget,
            "use": makers.use(
                chosen,
                is_auto=plan.is_auto,
                rounds=rounds,
                has_scratch=scratch is not None,
                needs_fisher=entry.needs_fisher,
                joins=plan.is_auto or recalibrate,
            ),
        }
    elif scratch is not None or scratch_budget is not None:
        raise InvalidArgument("scratch and scratch_budget require memory_budget")
    # Only a later round that measures has weights that are not the dense ones.
    dense = copies(chosen) if curvature == "features" and recalibrate and rounds > 1 else None
    job = makers.job(model, batches, samples, plan, chosen, statistics, resolve_loss(loss), dense)
    limit = Limit.of(max_loss_increase, max_accuracy_drop, confidence)
    # Bad fractions are refused before anything is computed.
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    if limit is None:
        if held_out is not None:
            raise InvalidArgument("held_out: is for max_loss_increase or max_accuracy_drop")
        check_ranking(shapes, sparsity, **plan.ranking)
        keeper = None
        if checkpoint is not None:
            how = {f.name: getattr(plan, f.name) for f in fields(Plan) if f.name != "shelf"}
            asked = {"sparsity": sparsity, "rounds": rounds, "samples": samples, **how}
            keeper = makers.checkpoint(
                checkpoint, {**asked, "precision": precision, "curvature": curvature}
            )
        goals = rising_goals(sparsity, rounds)
        done = prune_in_rounds(job, goals, recalibrate=recalibrate, checkpoint=keeper)
        return PruneResult(*done)
    if sparsity is not None or rounds != 1 or pattern is not None or recalibrate or checkpoint:
        raise InvalidArgument(
            "max_loss_increase, max_accuracy_drop: find the sparsity, in one round and without a "
            "pattern; leave sparsity, rounds, pattern, recalibrate and checkpoint out"
        )
    check_ranking(shapes, 0.0, **plan.ranking)
    if batches is None and held_out is None:
        raise InvalidArgument("batches: is None; a limit needs labelled images to be tested on")
    return PruneResult(*prune_safely(job, limit, held_out))


def _first_images(
    batches: Batches | None, samples: int | None
) -> tuple[Tensor | None, Batches | None]:
    """The first images, and batches that still give them."""
    if batches is None:
        return None, None
    if isinstance(batches, Iterator):
        first = list(itertools.islice(batches, 1))
        batches = itertools.chain(first, batches)
    else:
        first = list(itertools.islice(batches, 1))
    most = None if samples is None else 1
    return next(as_batches(first, most, "ignored"))[0], batches
