"""The steps of a refitting: Adam on the kept weights, judged on held-out images."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from functools import partial
from typing import Any

import torch

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
# `lr="auto"`: the learning rate relative to the root mean square of the kept weights of a tensor,
# at least to this value, and the factor by which it falls where it does not lower the error.
_RELATIVE, _LEAST, _FALL = 0.02, 1e-3, 4.0
_RISE = 1.5  # of the held-out error that is accepted in the first half of the steps
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
        lr = _RELATIVE if how.lr == "auto" else how.lr
        best, kept, misses = before, 0, 0
        best_weights = copies(self._parameters)
        history: list[dict[str, Any]] = []
        every = max(1, steps // how.checks)
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
            elif how.lr == "auto" and not kept and _is_too_fast(value / before, done / steps):
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

    def _groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the parameters with their learning rates."""
        if self._how.lr != "auto":
            return [{"params": list(self._parameters.values()), "lr": lr}]
        groups = []
        for parameter in self._parameters.values():
            kept = at_least_float32(parameter.detach())
            squares = kept.square().sum() / kept.count_nonzero().clamp(min=1)
            groups.append({"params": [parameter], "lr": lr * max(float(squares.sqrt()), _LEAST)})
        return groups

    def _steps(self, lr: float, steps: int) -> Generator[float, None, None]:
        """Make steps; yields the training error of each."""
        generator = torch.Generator().manual_seed(self._seed)
        draws = iter(Draws(self._source, self._how.batch_size, generator, self._room))
        optimizer = torch.optim.Adam(self._groups(lr))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
        augment = self._how.augmentation
        with self._masks.hold(self._model, optimizer):
            for _ in range(steps):
                images = next(draws)
                if augment is not None:
                    images = augment(images, generator)
                optimizer.zero_grad()
                total = 0.0
                for part in parts([(images, None)], self._micro_batch):
                    with torch.enable_grad():
                        error = self._matching.error(part) * (len(part) / len(images))
                    torch.autograd.backward(error)
                    total += float(error.detach())
                if math.isfinite(total):
                    optimizer.step()
                schedule.step()
                yield total
        optimizer.zero_grad()


def _is_too_fast(rise: float, part: float) -> bool:
    """Tell whether the learning rate is too high: the error rises by `rise` in a part of the steps.

    A high rate raises the error at first and lowers it as it decays.
    """
    return part < 1 and (rise > _RISE or part >= 1 / 2)


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: a linear rise, then half a cosine."""
    rise = max(1, round(_WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2
