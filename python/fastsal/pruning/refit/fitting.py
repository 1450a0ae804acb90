"""The steps of a refitting: Adam on the kept weights, judged on held-out images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsal.data.batches import Pair
from fastsal.errors import NonFiniteLoss
from fastsal.gradients.precision import at_least_float32
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.refit.draws import Draws
from fastsal.pruning.refit.matching import Matching, parts
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.shelf import copies, restore
from fastsal.utils.progress import Report

_PASSES = 2  # over the images, with `steps="auto"`
# `lr="auto"` is relative to the root mean square of the kept weights of a tensor, at least to
# `_LEAST`: a multiple of the best single step, which is searched in factors of two. Long runs bear
# higher rates, as these decay: the multiple is half the square root of the number of steps, at
# least `_MULTIPLE`. The rate falls by `_FALL` where the held-out error rises by `_RISE`, or rises
# at all in the second half.
_LEAST, _FIRST_STEP, _SMALLEST_STEP, _MULTIPLE = 1e-3, 1e-3, 1e-7, 2.0
_FALL, _RISE = 4.0, 1.5
_WARM_UP = 0.1  # fraction of the steps in which the learning rate rises


class Fitting:
    """One refitting of a model.

    Args:
        matching: The two models.
        source: Training images, iterable again.
        how: Checked settings.
        masks: Masks to hold.
        seed: Seed of all draws.
        micro_batch: Images of one forward and backward pass.
        room: Bytes for images that wait for their turn.
    """

    def __init__(
        self,
        matching: Matching,
        source: Iterable[Pair],
        how: Refit,
        masks: Masks,
        *,
        seed: int,
        micro_batch: int,
        room: int,
    ) -> None:
        self._matching, self._model = matching, matching.model
        self._source, self._how, self._masks = source, how, masks
        self._seed, self._micro_batch, self._room = seed, micro_batch, room
        self._parameters = dict(self._model.named_parameters())
        # Optimizer and schedule, since the first step at the present learning rate.
        self._moving: tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR] | None = None

    def run(
        self,
        report: Report,
        saved: Mapping[str, Any] | None = None,
        save: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Refit; returns the attributes of a `RefitResult`, except windows and seconds.

        Args:
            report: Called with the steps done and in total.
            saved: What `save` got in an earlier run, to go on from there.
            save: Called with the state after each measurement but the last.
        """
        how = self._how
        self._matching.find_scales(self._micro_batch)
        state = self._begun() if saved is None else _State(**saved["state"])
        if saved is not None:
            restore(self._parameters, saved["weights"])
        steps, every = state.steps, math.ceil(state.steps / how.checks)
        sums: list[float] = []
        course = self._steps(state.lr, steps - state.began, saved)
        try:
            while not state.is_over(how.patience):
                sums.append(next(course))
                state.done += 1
                report(state.done, steps)
                if state.done % every and state.done != steps:
                    continue
                value = self._held_out_error()
                error = sum(sums) / len(sums)
                sums = []
                if state.improves(error, value):
                    state.best_weights = copies(self._parameters)
                elif how.lr == "auto" and state.is_too_fast(value):
                    course.close()
                    restore(self._parameters, state.best_weights)
                    state.lr /= _FALL
                    state.began, self._moving = state.done, None
                    course = self._steps(state.lr, steps - state.began)
                if save is not None and not state.is_over(how.patience):
                    moving = self._moving and [each.state_dict() for each in self._moving]
                    weights = copies(self._parameters)
                    save({"state": vars(state), "weights": weights, "moving": moving})
        finally:
            course.close()  # it holds the masks, also where weights are restored
        restore(self._parameters, state.best_weights)
        return {
            "before": state.before,
            "after": state.best,
            "kept_step": state.kept,
            "steps": state.done,
            "lr": state.lr,
            "micro_batch": self._micro_batch,
            "history": state.history,
        }

    def _begun(self) -> _State:
        """Return the state before the first step."""
        how, before = self._how, self._held_out_error()
        if not math.isfinite(before):
            raise NonFiniteLoss(f"the error of the pruned model must be finite, got {before}")
        steps = self._count_steps() if how.steps == "auto" else how.steps
        lr = self._chosen_rate(steps) if how.lr == "auto" else how.lr
        return _State(before, steps, lr, before, copies(self._parameters))

    def _count_steps(self) -> int:
        images = sum(len(images) for images, _ in self._source)
        return max(1, math.ceil(_PASSES * images / self._how.batch_size))

    def _held_out_error(self) -> float:
        return self._matching.held_out_error(self._micro_batch)

    def _chosen_rate(self, steps: int) -> float:
        return max(_MULTIPLE, math.sqrt(steps) / 2) * self._best_step()

    def _best_step(self) -> float:
        """Return the step, relative to the weights, that lowers the error of one batch most.

        It is made along the signs of the gradient, as the first one of Adam. The sensitivity to
        such a step differs by a factor of forty between a ResNet and a vision transformer.
        """
        images = next(self._batches())
        start = copies(self._parameters)
        sizes = {name: _size(parameter) for name, parameter in self._parameters.items()}
        with self._masks.hold(self._model):
            self._backward(images)
        signs = {n: p.grad.sign() for n, p in self._parameters.items() if p.grad is not None}

        def error(size: float) -> float:
            restore(self._parameters, start)
            with torch.no_grad():
                for name, sign in signs.items():
                    self._parameters[name].sub_(sign, alpha=size * sizes[name])
            return self._matching.mean_error([(images, None)], self._micro_batch)

        size, factor = _FIRST_STEP, 2.0
        least, following = error(size), error(factor * size)
        if following >= least:
            factor = 0.5
            following = error(factor * size)
        while factor * size > _SMALLEST_STEP and (following < least or following == math.inf):
            size, least = factor * size, following
            following = error(factor * size)
        restore(self._parameters, start)
        for parameter in self._parameters.values():
            parameter.grad = None
        return size

    def _groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the parameters with their learning rates."""
        parameters = list(self._parameters.values())
        if self._how.lr != "auto":
            return [{"params": parameters, "lr": lr}]
        return [{"params": [p], "lr": lr * _size(p)} for p in parameters]

    def _batches(self) -> Iterator[Tensor]:
        """Yield augmented batches without end, the same ones in every call."""
        generator = torch.Generator().manual_seed(self._seed)
        augment = self._how.augmentation
        for images in Draws(self._source, self._how.batch_size, generator, self._room):
            yield images if augment is None else augment(images, generator)

    def _backward(self, images: Tensor) -> float:
        """Add the gradients of the error of images; return the error."""
        total = 0.0
        for part in parts([(images, None)], self._micro_batch):
            with torch.enable_grad():
                error = self._matching.error(part) * (len(part) / len(images))
            torch.autograd.backward(error)
            total += float(error.detach())
        return total

    def _steps(
        self, lr: float, steps: int, saved: Mapping[str, Any] | None = None
    ) -> Generator[float, None, None]:
        """Make steps; yields the training error of each.

        Args:
            lr: Learning rate.
            steps: Number of steps, those of an earlier run included.
            saved: State to go on from.
        """
        optimizer = torch.optim.Adam(self._groups(lr))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
        self._moving = optimizer, schedule
        first = 0
        if saved is not None and saved["moving"] is not None:
            of_optimizer, of_schedule = saved["moving"]
            optimizer.load_state_dict(of_optimizer)
            schedule.load_state_dict(of_schedule)
            first = saved["state"]["done"] - saved["state"]["began"]
        with self._masks.hold(self._model, optimizer):
            for images in itertools.islice(self._batches(), first, steps):
                optimizer.zero_grad()
                total = self._backward(images)
                if math.isfinite(total):
                    optimizer.step()
                schedule.step()
                yield total
        optimizer.zero_grad()


@dataclass
class _State:
    """Where a refitting is.

    Attributes:
        before: Held-out error before the first step.
        steps: Number of steps in all.
        lr: Learning rate.
        best: Least held-out error.
        best_weights: Those that have it.
        kept: Step after which they were found; 0 for the start.
        misses: Measurements since then.
        done: Steps that were made.
        began: Steps that were made before the learning rate was set.
        history: One entry for each measurement.
    """

    before: float
    steps: int
    lr: float
    best: float
    best_weights: dict[str, Tensor]
    kept: int = 0
    misses: int = 0
    done: int = 0
    began: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def is_over(self, patience: int) -> bool:
        """Whether no further step is made."""
        return self.done >= self.steps or self.misses >= patience

    def improves(self, error: float, held_out: float) -> bool:
        """Record a measurement; returns whether it is the best."""
        self.history.append({"step": self.done, "error": error, "held_out_error": held_out})
        self.misses += 1
        if held_out < self.best:
            self.best, self.kept, self.misses = held_out, self.done, 0
            return True
        return False

    def is_too_fast(self, error: float) -> bool:
        """Whether the learning rate is too high for a held-out error, and nothing was gained yet.

        A high rate raises the error at first and lowers it as it decays.
        """
        part = self.done / self.steps
        return not self.kept and part < 1 and (error > _RISE * self.before or part >= 1 / 2)


def _size(parameter: Tensor) -> float:
    """Return the root mean square of the weights that are not zero, at least a small one."""
    weights = at_least_float32(parameter.detach())
    squares = weights.square().sum() / weights.count_nonzero().clamp(min=1)
    return max(float(squares.sqrt()), _LEAST)


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: a linear rise, then half a cosine."""
    rise = max(1, round(_WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2
