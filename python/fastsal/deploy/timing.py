"""Time of a model against another one, in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.models.evaluating import evaluating, to_model

# Distance of the quartiles of ratios around 1 from which they say nothing.
_NOISY = 0.5

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of two models for the same images, measured in turn.

    Attributes:
        batch: Number of images of a run.
        dense: Median seconds of the first model, and its quartiles.
        pruned: The same of the second one.
        speedup: Median of the ratios of neighboring runs, first over second, and its quartiles.
        rounds: Number of pairs of runs.
    """

    batch: int
    dense: tuple[float, float, float]
    pruned: tuple[float, float, float]
    speedup: tuple[float, float, float]
    rounds: int

    @property
    def is_faster(self) -> bool:
        """Whether the second model is faster in at least three pairs of four."""
        return self.speedup[1] > 1

    @property
    def verdict(self) -> str:
        """What the ratios say, in words."""
        middle, low, high = self.speedup
        ratio = f"{middle:.2f} times as fast ({low:.2f} to {high:.2f})"
        if self.is_faster:
            return ratio
        if high < 1:
            return f"slower here: {ratio}"
        if high - low > _NOISY:
            return (
                f"not measurable here, as times vary too much: {ratio}; repeat on an idle machine"
            )
        return f"no faster here: {ratio}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; of three values the first is the median."""
        return {
            **{name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()},
            "images_per_second": [self.batch / self.dense[0], self.batch / self.pruned[0]],
            "verdict": self.verdict,
        }


def time_pair(dense: Run, pruned: Run, batch: int, *, seconds: float, least: int = 7) -> Timing:
    """Time two calls in turn, each pair in the opposite order of the pair before.

    Args:
        dense: Runs the first model on a batch.
        pruned: Runs the second model on it.
        batch: Number of images of a run, for the record.
        seconds: Time to spend.
        least: Least number of pairs.
    """
    for _ in range(2):
        dense()
        pruned()
    found: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(found[0]) < least or time.perf_counter() - start < seconds:
        order = (0, 1) if len(found[0]) % 2 else (1, 0)
        for side in order:
            begin = time.perf_counter()
            (dense, pruned)[side]()
            found[side].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(*found, strict=True)]
    return Timing(batch, _spread(found[0]), _spread(found[1]), _spread(ratios), len(ratios))


def _spread(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def torch_run(model: nn.Module, images: Tensor) -> Run:
    """Return a call that runs a model on images, and waits for its device."""
    images = to_model(images, model)

    def run() -> object:
        with torch.inference_mode():
            result = model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return result

    return run


def time_models(dense: nn.Module, pruned: nn.Module, images: Tensor, *, seconds: float) -> Timing:
    """Time two models of PyTorch on the same images `[n, ...]`."""
    with evaluating(dense), evaluating(pruned):
        return time_pair(
            torch_run(dense, images), torch_run(pruned, images), len(images), seconds=seconds
        )
