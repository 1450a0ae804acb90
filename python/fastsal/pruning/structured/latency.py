"""Latencies of the parts of a model, measured at several widths.

Time stamps at the layers of the groups divide a forward pass into segments. A segment between the
first producer and the last consumer of a group depends on the units of this group: layers,
activations and attention in between included. All groups have the same fraction of their units
while the model runs; the latency at other widths is interpolated, for a segment of several groups
at the geometric mean of their fractions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.models.evaluating import outputs
from fastsal.models.hooks import hooked
from fastsal.pruning.structured.groups import Group, cut, restored

# Fractions of the units at which a model is measured, falling.
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
# Turns through the fractions, in about so many seconds, with so many runs at each fraction; one
# more run comes first and is not counted.
_LEAST_TURNS, _MOST_TURNS, _SECONDS, _RUNS = 5, 40, 15.0, 3

Stamps = list[tuple[float, str, bool]]  # time in s, name of a layer, whether it begins
_Run = dict[tuple[str, ...], float]  # names of groups to the seconds of what depends on them


@dataclass(frozen=True)
class Segment:
    """The latency of a part of a model.

    Attributes:
        groups: Names of the groups that it depends on.
        seconds: Seconds at the fractions of `FRACTIONS`, not rising.
    """

    groups: tuple[str, ...]
    seconds: tuple[float, ...]

    def value(self, fractions: Mapping[str, float]) -> float:
        """Return the seconds with a fraction of the units of each group; others have all."""
        if not self.groups:
            return self.seconds[0]
        product = math.prod(fractions.get(name, 1.0) for name in self.groups)
        fraction = product ** (1 / len(self.groups))
        for left, right, more, fewer in zip(
            FRACTIONS, FRACTIONS[1:], self.seconds, self.seconds[1:], strict=False
        ):
            if fraction >= right:
                return fewer + (more - fewer) * (fraction - right) / (left - right)
        return self.seconds[-1]


def measure_segments(
    model: nn.Module,
    groups: Sequence[Group],
    images: Tensor,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Segment]:
    """Return the segments of a model.

    Args:
        model: The model with all units; unchanged at the end.
        groups: Its groups.
        images: Images `[n, ...]` of one forward pass.
        clock: Returns the time in s.
    """
    layers = {name for group in groups for name in (*group.producers, *group.consumers)}
    runs: list[list[_Run]] = [[] for _ in FRACTIONS]
    start, turns = clock(), 0
    while turns < _LEAST_TURNS or (turns < _MOST_TURNS and clock() - start < _SECONDS):
        turns += 1
        for place, fraction in enumerate(FRACTIONS):
            with restored(model), _stamping(model, layers, clock) as stamps:
                cut(model, [(group, _some(group, fraction)) for group in groups])
                for run in range(_RUNS + 1):
                    stamps.clear()
                    outputs(model, images)
                    if run:
                        runs[place].append(_durations(stamps, groups))
    medians = [_medians(some) for some in runs]
    return [Segment(key, _not_rising([each[key] for each in medians])) for key in medians[0]]


def _medians(runs: Sequence[_Run]) -> _Run:
    """Return the median of each part over runs; a run that is slow as a whole is scaled."""
    totals = [sum(run.values()) for run in runs]
    usual = statistics.median(totals)
    return {
        key: statistics.median(
            run[key] * usual / (total or 1.0) for run, total in zip(runs, totals, strict=True)
        )
        for key in runs[0]
    }


def _not_rising(values: Sequence[float]) -> tuple[float, ...]:
    """Return the nearest values that do not rise: pools of neighbors at their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (left, n), (right, m) = pools[-2:]
            pools[-2:] = [((n * left + m * right) / (n + m), n + m)]
    return tuple(mean for mean, count in pools for _ in range(count))


def _some(group: Group, fraction: float) -> Tensor:
    """Return units to keep, evenly spaced; latency does not depend on which ones."""
    count = max(1, round(fraction * group.units))
    return torch.arange(count, device="cpu") * group.units // count


@contextmanager
def _stamping(model: nn.Module, layers: set[str], clock: Callable[[], float]) -> Iterator[Stamps]:
    """Collect the times at which a run begins, layers begin and end, and the run ends."""
    stamps: Stamps = []
    device = next(model.parameters()).device

    def hook(name: str, *, begins: bool) -> Callable[..., None]:
        def stamp(*_: object) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            stamps.append((clock(), name, begins))

        return stamp

    watched = {"": model} | {name: model.get_submodule(name) for name in layers}
    with hooked(
        handle
        for name, module in watched.items()
        for handle in (
            module.register_forward_pre_hook(hook(name, begins=True)),
            module.register_forward_hook(hook(name, begins=False)),
        )
    ):
        yield stamps


def _durations(stamps: Stamps, groups: Sequence[Group]) -> _Run:
    """Return the seconds of a run by the names of the groups that a part of it depends on."""
    begins = {name: i for i, (_, name, begun) in reversed(list(enumerate(stamps))) if begun}
    ends = {name: i for i, (_, name, begun) in enumerate(stamps) if not begun}
    spans = {
        group.name: (
            min(begins[name] for name in group.producers if name in begins),
            max(ends[name] for name in group.consumers if name in ends),
        )
        for group in groups
    }
    found: _Run = {}
    for i in range(len(stamps) - 1):
        key = tuple(name for name, (first, last) in spans.items() if first <= i < last)
        found[key] = found.get(key, 0.0) + stamps[i + 1][0] - stamps[i][0]
    return found
