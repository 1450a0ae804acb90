"""The steps of a refitting: Adam on the kept weights, judged on held-out images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
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

    def run(self, report: Report) -> dict[str, Any]:
        """Refit; returns the attributes of a `RefitResult`, except windows and seconds."""
        how = self._how
        self._matching.find_scales(self._micro_batch)
        before = self._held_out_error()
        if not math.isfinite(before):
            raise NonFiniteLoss(f"the error of the pruned model must be finite, got {before}")
        steps = self._count_steps() if how.steps == "auto" else how.steps
        lr = self._chosen_rate(steps) if how.lr == "auto" else how.lr
        best, kept, misses = before, 0, 0
        best_weights = copies(self._parameters)
        history: list[dict[str, Any]] = []
        every = math.ceil(steps / how.checks)
        sums: list[float] = []
        done = 0
        course = self._steps(lr, steps)
        while done < steps and misses < how.patience:
            sums.append(next(course))
            done += 1
            report(done, steps)
            if done % every and done != steps:
                continue
            value = self._held_out_error()
            history.append({"step": done, "error": sum(sums) / len(sums), "held_out_error": value})
            sums, misses = [], misses + 1
            if value < best:
                best, kept, misses = value, done, 0
                best_weights = copies(self._parameters)
            elif how.lr == "auto" and not kept and _is_too_fast(value, before, done / steps):
                course.close()
                restore(self._parameters, best_weights)
                lr /= _FALL
                course = self._steps(lr, steps - done)
        course.close()
        restore(self._parameters, best_weights)
        return {
            "before": before,
            "after": best,
            "kept_step": kept,
            "steps": done,
            "lr": lr,
            "micro_batch": self._micro_batch,
            "history": history,
        }

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

    def _steps(self, lr: float, steps: int) -> Generator[float, None, None]:
        """Make steps; yields the training error of each."""
        optimizer = torch.optim.Adam(self._groups(lr))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
        with self._masks.hold(self._model, optimizer):
            for images in itertools.islice(self._batches(), steps):
                optimizer.zero_grad()
                total = self._backward(images)
                if math.isfinite(total):
                    optimizer.step()
                schedule.step()
                yield total
        optimizer.zero_grad()


def _size(parameter: Tensor) -> float:
    """Return the root mean square of the weights that are not zero, at least a small one."""
    weights = at_least_float32(parameter.detach())
    squares = weights.square().sum() / weights.count_nonzero().clamp(min=1)
    return max(float(squares.sqrt()), _LEAST)


def _is_too_fast(error: float, before: float, part: float) -> bool:
    """Tell whether the learning rate is too high for an error after a part of the steps.

    A high rate raises the error at first and lowers it as it decays.
    """
    return part < 1 and (error > _RISE * before or part >= 1 / 2)


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: a linear rise, then half a cosine."""
    rise = max(1, round(_WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2
