"""Prune a model: statistics, scores, masks and compensation, in one round or several."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.collection import Batches, Loss, as_batches, check_samples, collect
from fastsal.compensation import compensate as compensate_model
from fastsal.criteria import CRITERIA, score
from fastsal.criteria.scoring import find_criterion
from fastsal.damping import DampingChoice, HeldOut, candidates, choose_damping
from fastsal.errors import InvalidArgument, PrecisionWarning
from fastsal.fisher import BlockFisher, check_damping
from fastsal.gradients import select_parameters
from fastsal.gradients.losses import resolve_loss
from fastsal.masks import Masks
from fastsal.ranking import rank
from fastsal.safe_pruning import Examination, restore, search
from fastsal.safety import Limit, SafetyReport

# One sample in so many is kept for the test of a limit.
_TESTED_EVERY = 4
# Where the damping is chosen when the sparsity is not known yet.
_TYPICAL_SPARSITY = 0.7
# One sample in so many is held out for the choice of damping, at most so many in all.
_HELD_OUT_EVERY = 8
_HELD_OUT_MOST = 1024


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did.

    Attributes:
        masks: True = kept; the model is zero elsewhere.
        scores: The scores of the last round, name to float32.
        history: One entry a round: `round`, `sparsity` reached, `samples`, `damping`,
            `damping_evidence` (pairs of λ and held-out loss), `predicted_increase` of the loss
            (with compensation) and `seconds` of each step.
        safety: With `max_loss_increase` or `max_accuracy_drop`: what was tested.
    """

    masks: Masks
    scores: dict[str, Tensor]
    history: list[dict[str, Any]] = field(default_factory=list)
    safety: SafetyReport | None = None


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
    loss: str | Loss = "cross-entropy",
    labels: str = "true",
    parameters: str | Sequence[str] | None = None,
    precision: str = "float32",
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    seed: int = 0,
    max_loss_increase: float | None = None,
    max_accuracy_drop: float | None = None,
    confidence: float = 0.95,
    held_out: Batches | None = None,
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
        damping: `λ`, or `"auto"`: one sample in eight is held out, the λ that leaves the least loss
            on them is taken, and they are added to the statistics then.
        samples: Samples of each round; None takes all.
        block_size: As for `collect`.
        scope: As for `rank`; so are `pattern` and `floor`.
        pattern: `"N:M"`, one round only.
        floor: Least kept fraction of any parameter.
        loss: As for `collect`; so are all that follow.
        labels: `"true"` or `"sampled"`.
        parameters: Names or patterns.
        precision: Of the sums.
        micro_batch: Samples of one pass.
        autocast: Type of the passes.
        progress: A bar, or a function.
        seed: Of everything with chance in it.
        max_loss_increase: Instead of `sparsity`: prune to the highest that keeps the rise of the
            mean loss below this on images that were held out (see `fastsal.safety`; the loss of an
            image counts at most what guessing costs). One round, no pattern.
        max_accuracy_drop: The same for top-1 accuracy, a fraction.
        confidence: Of that promise.
        held_out: Labelled images to test the limit on; None holds one sample in four out. The
            promise is about images like these: give some that the model was not trained on.

    Returns:
        Masks, scores and history.

    Raises:
        InvalidArgument: An argument is not taken. In this and in every other case the model is
            as it was.
        DataError, NonFiniteGradient, UnknownParameter, UnsupportedLayer: As `collect`.
        FactorizationError: A block cannot be factored with this damping.
    """
    entry = CRITERIA[find_criterion(criterion)]
    plan = _Plan(
        criterion=criterion,
        needs_fisher=entry.needs_fisher or compensate,
        needs_damping=entry.needs_damping or compensate,
        compensate=compensate,
        damping=damping,
        ranking={"scope": scope, "pattern": pattern, "floor": floor},
        parameters=parameters,
        seed=seed,
    )
    plan.check(rounds, batches)
    check_samples(samples)
    statistics: dict[str, Any] = {
        "block_size": block_size,
        "loss": loss,
        "labels": labels,
        "parameters": parameters,
        "precision": precision,
        "micro_batch": micro_batch,
        "autocast": autocast,
        "progress": progress,
    }
    chosen = select_parameters(model, parameters)
    limit = Limit.of(max_loss_increase, max_accuracy_drop, confidence)
    if limit is not None:
        if sparsity is not None or rounds != 1 or pattern is not None:
            raise InvalidArgument(
                "max_loss_increase, max_accuracy_drop: find the sparsity, in one round and without "
                "a pattern; leave sparsity, rounds and pattern out"
            )
        rank({name: torch.zeros(p.shape) for name, p in chosen.items()}, 0.0, **plan.ranking)
        if batches is None and held_out is None:
            raise InvalidArgument("batches: is None; a limit needs labelled images to be tested on")
        return _prune_safely(
            model, batches, plan, limit, chosen, statistics, samples=samples, held_out=held_out
        )
    if held_out is not None:
        raise InvalidArgument("held_out: is for max_loss_increase or max_accuracy_drop")
    # Bad fractions are refused before anything is computed.
    rank({name: torch.zeros(p.shape) for name, p in chosen.items()}, sparsity, **plan.ranking)
    goals = _goals(sparsity, rounds)
    original = {name: p.detach().clone() for name, p in chosen.items()}
    masks: Masks | None = None
    history: list[dict[str, Any]] = []
    scores: dict[str, Tensor] = {}
    try:
        for number, goal in enumerate(goals, start=1):
            clock = _Clock()
            fisher = rest = tuned = None
            if plan.needs_fisher and batches is not None:
                held: list[tuple[Tensor, Tensor | None]] = []
                source = as_batches(batches, samples, labels)
                if plan.is_auto:
                    source = _holding_out(source, held)
                fisher = collect(model, source, seed=seed + number - 1, **statistics)
                if plan.is_auto:
                    some = _limited(held)
                    # Before they are used, as this checks them.
                    quiet = {**statistics, "progress": False}
                    rest = collect(model, held, seed=seed + rounds + number, **quiet)
                    tuned = HeldOut.of(model, some, resolve_loss(loss))
            clock.lap("statistics")
            choice = plan.choose(model, fisher, masks, goal, chosen, tuned)
            clock.lap("damping")
            if fisher is not None and rest is not None:
                fisher.merge(rest)
            scores, masks, increase = plan.step(model, fisher, masks, goal, choice.damping)
            clock.lap("prune")
            history.append(
                {
                    "round": number,
                    "sparsity": masks.sparsity,
                    "samples": 0 if fisher is None else fisher.samples,
                    "damping": choice.damping if plan.needs_damping else None,
                    "damping_evidence": choice.evidence,
                    "predicted_increase": increase,
                    "seconds": clock.laps,
                }
            )
    except BaseException:
        restore(chosen, original)
        raise
    if masks is None:
        raise InvalidArgument(f"rounds: got {rounds}; takes 1 or more")
    masks.recipe.update(
        criterion=criterion,
        rounds=rounds,
        compensate=compensate,
        damping=[entry["damping"] for entry in history],
        samples=history[-1]["samples"],
        block_size=block_size,
        seed=seed,
    )
    return PruneResult(masks, scores, history)


def _prune_safely(
    model: nn.Module,
    batches: Batches | None,
    plan: _Plan,
    limit: Limit,
    chosen: Mapping[str, nn.Parameter],
    statistics: dict[str, Any],
    *,
    samples: int | None,
    held_out: Batches | None,
) -> PruneResult:
    """`prune` with a limit: statistics, damping and test on images of their own."""
    clock = _Clock()
    original = {name: p.detach().clone() for name, p in chosen.items()}
    loss = resolve_loss(statistics["loss"])
    try:
        fisher = None
        tested: list[tuple[Tensor, Tensor | None]] = []
        held: list[tuple[Tensor, Tensor | None]] = []
        source: Iterable[tuple[Tensor, Tensor | None]] = ()
        if held_out is not None:
            tested = list(as_batches(held_out, None))
        if batches is not None:
            source = as_batches(batches, samples, statistics["labels"])
            if held_out is None:
                source = _holding_out(source, tested, _TESTED_EVERY)
        if plan.needs_fisher:
            if plan.is_auto:
                source = _holding_out(source, held)
            fisher = collect(model, source, seed=plan.seed, **statistics)
        else:
            for _ in source:  # fills `tested`
                pass
        examination = Examination(model, tested, limit, loss)
        clock.lap("statistics")
        tuned = HeldOut.of(model, _limited(held), loss) if plan.is_auto else None
        choice = plan.choose(model, fisher, None, _TYPICAL_SPARSITY, chosen, tuned)
        if fisher is not None and held:
            fisher.merge(collect(model, held, seed=plan.seed + 1, **statistics))
        clock.lap("damping")
        masks, scores, increase, report = search(
            model,
            fisher,
            examination,
            criterion=plan.criterion,
            damping=choice.damping,
            compensates=plan.compensate,
            ranking=plan.ranking,
            chosen=chosen,
            seed=plan.seed,
        )
        clock.lap("search")
    except BaseException:
        restore(chosen, original)
        raise
    history = [
        {
            "round": 1,
            "sparsity": masks.sparsity,
            "samples": 0 if fisher is None else fisher.samples,
            "damping": choice.damping if plan.needs_damping else None,
            "damping_evidence": choice.evidence,
            "predicted_increase": increase,
            "seconds": clock.laps,
        }
    ]
    masks.recipe.update(
        criterion=plan.criterion,
        rounds=1,
        compensate=plan.compensate,
        damping=[history[0]["damping"]],
        samples=history[0]["samples"],
        block_size=statistics["block_size"],
        seed=plan.seed,
        limit=vars(limit),
    )
    return PruneResult(masks, scores, history, report)


@dataclass(frozen=True)
class _Plan:
    """What is the same in every round."""

    criterion: str
    needs_fisher: bool
    needs_damping: bool
    compensate: bool
    damping: float | str
    ranking: Mapping[str, Any]
    parameters: str | Sequence[str] | None
    seed: int

    @property
    def is_auto(self) -> bool:
        return self.needs_damping and self.damping == "auto"

    def check(self, rounds: int, batches: Batches | None) -> None:
        if not isinstance(rounds, int) or rounds < 1:
            raise InvalidArgument(f"rounds: got {rounds!r}; takes 1 or more")
        if rounds > 1 and self.ranking["pattern"] is not None:
            raise InvalidArgument("rounds: a pattern is reached in one; takes rounds=1 with it")
        if isinstance(self.damping, str) and self.damping != "auto":
            raise InvalidArgument(f"damping: got {self.damping!r}; takes a number or 'auto'")
        if self.needs_damping and not isinstance(self.damping, str):
            check_damping(self.damping)
        if self.needs_fisher and batches is None:
            raise InvalidArgument(
                f"batches: is None; {self.criterion!r} or compensation needs labelled images"
            )
        if rounds > 1 and isinstance(batches, Iterator):
            raise InvalidArgument(
                "batches: is an iterator, which gives its images once; with several rounds takes "
                "a list, a DataLoader or anything else that can be iterated again"
            )

    def step(
        self,
        model: nn.Module,
        fisher: BlockFisher | None,
        masks: Masks | None,
        goal: float | None,
        damping: float,
    ) -> tuple[dict[str, Tensor], Masks, float | None]:
        """Score, rank and prune in place."""
        named = {} if fisher is not None else {"parameters": self.parameters}
        scores = score(model, fisher, self.criterion, damping, masks=masks, seed=self.seed, **named)
        new = rank(scores, goal, **self.ranking)
        increase = None
        if self.compensate and fisher is not None:
            increase = compensate_model(model, fisher, new, damping, before=masks).total
        new.apply(model)
        return scores, new, increase

    def choose(
        self,
        model: nn.Module,
        fisher: BlockFisher | None,
        masks: Masks | None,
        goal: float | None,
        chosen: Mapping[str, nn.Parameter],
        held_out: HeldOut | None,
    ) -> DampingChoice:
        """The damping of a round; the model is as before."""
        if not isinstance(self.damping, str):
            return DampingChoice(self.damping, [])
        if held_out is None or fisher is None:
            return DampingChoice(1.0, [])  # nothing that is used depends on it
        start = {name: p.detach().clone() for name, p in chosen.items()}

        def prune_with(damping: float) -> None:
            restore(chosen, start)
            with warnings.catch_warnings():
                # Said for the damping that is taken, not for those that are tried.
                warnings.simplefilter("ignore", PrecisionWarning)
                self.step(model, fisher, masks, goal, damping)

        try:
            return choose_damping(candidates(fisher), prune_with, lambda: held_out.mean_loss(model))
        finally:
            restore(chosen, start)


class _Clock:
    """Seconds of named steps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def _goals(sparsity: float | None, rounds: int) -> list[float | None]:
    """The sparsity after each round; the last one is exactly what was asked for."""
    if sparsity is None:
        return [None] * rounds
    rising = [1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)]
    return [*rising, sparsity]


def _holding_out(
    batches: Iterable[tuple[Tensor, Tensor | None]],
    held: list[tuple[Tensor, Tensor | None]],
    every: int = _HELD_OUT_EVERY,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Keep one sample in `every` in `held` and pass the others on."""
    start = 0
    for images, labels in batches:
        at = torch.arange(start, start + images.shape[0])
        start += images.shape[0]
        out = at % every == every - 1
        if out.any():
            held.append((images[out], None if labels is None else labels[out]))
        if not out.all():
            yield images[~out], None if labels is None else labels[~out]


def _limited(
    held: list[tuple[Tensor, Tensor | None]],
) -> list[tuple[Tensor, Tensor | None]]:
    if not held:
        raise InvalidArgument(
            f"damping: 'auto' holds one sample in {_HELD_OUT_EVERY} out; takes {_HELD_OUT_EVERY} "
            "samples or more, or a number"
        )
    some: list[tuple[Tensor, Tensor | None]] = []
    left = _HELD_OUT_MOST
    for images, labels in held:
        if left > 0:
            some.append((images[:left], None if labels is None else labels[:left]))
            left -= images.shape[0]
    return some
