"""The steps of a refitting: Adam on the kept weights, judged on held-out images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastsal.data.batches import Pair
from fastsal.errors import NonFiniteLoss
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.refit.draws import Draws
from fastsal.pruning.refit.matching import Matching, parts
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.shelf import copies, restore
from fastsal.utils.progress import Report

# Learning rates of Adam that `lr="auto"` tries, each for this fraction of the steps.
_RATES = (2e-3, 5e-4, 1e-4)
_TRIAL = 1 / 20


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
        lr = how.lr if how.lr != "auto" else self._choose_rate()
        best, kept, misses = before, 0, 0
        best_weights = copies(self._parameters)
        history: list[dict[str, Any]] = []
        every = max(1, how.steps // how.checks)
        sums: list[float] = []
        done = 0
        for done, error in enumerate(self._steps(lr, how.steps), start=1):
            sums.append(error)
            report(done, how.steps)
            if done % every and done != how.steps:
                continue
            value = self._held_out_error()
            history.append({"step": done, "error": sum(sums) / len(sums), "held_out_error": value})
            sums, misses = [], misses + 1
            if value < best:
                best, kept, misses = value, done, 0
                best_weights = copies(self._parameters)
            if misses >= how.patience:
                break
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

    def _held_out_error(self) -> float:
        return self._matching.held_out_error(self._micro_batch)

    def _choose_rate(self) -> float:
        """Return the rate with the least held-out error after a few steps."""
        start = copies(self._parameters)
        steps = max(1, round(self._how.steps * _TRIAL))
        tried = {}
        for lr in _RATES:
            for _ in self._steps(lr, steps):
                pass
            tried[lr] = self._held_out_error()
            restore(self._parameters, start)
        return min(tried, key=lambda lr: (tried[lr], lr))

    def _steps(self, lr: float, steps: int) -> Iterator[float]:
        """Make steps with a cosine decay; yields the training error of each."""
        generator = torch.Generator().manual_seed(self._seed)
        draws = iter(Draws(self._source, self._how.batch_size, generator, self._room))
        optimizer = torch.optim.Adam(self._parameters.values(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
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
