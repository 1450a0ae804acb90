"""How many units each group keeps: the cheapest ones go until the budget is met.

Units go in the order of their group, in steps that end at a multiple of a width that hardware
likes. The next step is the one of least cost for what it saves.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.pruning.structured.find import Units
from fastsal.pruning.structured.groups import Group, tensor_of
from fastsal.pruning.structured.latency import Segment

# Widths of at least this many units are rounded to a multiple of `MULTIPLE`.
_WIDE = 64
MULTIPLE = 8
# Where the floors of candidates lie, between the lowest and that of uniform widths.
_STEPS = (0.4, 0.7)


@dataclass(frozen=True)
class _Term:
    """A count that shrinks with the units of some groups.

    Attributes:
        amount: The count with all units.
        groups: Names of the groups.
    """

    amount: float
    groups: tuple[str, ...]

    def value(self, fractions: Mapping[str, float]) -> float:
        """Return the count with a fraction of the units of each group; others have all."""
        return self.amount * math.prod(fractions.get(name, 1.0) for name in self.groups)


class Sizes:
    """The sizes of a model as functions of the units that its groups keep.

    Args:
        model: The model with all units.
        units: Its groups.
        segments: Its latency; empty if it was not measured.
    """

    def __init__(self, model: nn.Module, units: Units, segments: Sequence[Segment] = ()) -> None:
        self._all = {group.name: group.units for group in units.groups}
        touched: dict[str, list[str]] = {}
        for group in units.groups:
            for part in group.slices:
                if isinstance(tensor_of(model, part), nn.Parameter):
                    touched.setdefault(part.name, []).append(group.name)
        parameters = dict(model.named_parameters())
        self._terms: dict[str, Sequence[_Term | Segment]] = {
            "latency": segments,
            "units": [_Term(group.units, (group.name,)) for group in units.groups],
            "parameters": [
                _Term(p.numel(), tuple(touched.get(name, ()))) for name, p in parameters.items()
            ],
            "macs": [
                _Term(parameters[name].numel() * each, tuple(touched.get(name, ())))
                for name, each in units.macs.items()
            ],
        }

    def total(self, what: str, kept: Mapping[str, int] | None = None) -> float:
        """Return the units, parameters, multiply-accumulates of an image, or latency in s.

        Args:
            what: `"units"`, `"parameters"`, `"macs"` or `"latency"`.
            kept: Name of a group to its units; others keep all.
        """
        fractions = self._fractions(kept or {})
        return sum(term.value(fractions) for term in self._terms[what])

    def saving(self, what: str, kept: Mapping[str, int], name: str, fewer: int) -> float:
        """Return what is saved if a group keeps `fewer` units in place of `kept[name]`."""
        before, after = self._fractions(kept), self._fractions({**kept, name: fewer})
        return sum(
            term.value(before) - term.value(after)
            for term in self._terms[what]
            if name in term.groups
        )

    def _fractions(self, kept: Mapping[str, int]) -> dict[str, float]:
        return {name: units / self._all[name] for name, units in kept.items()}


def least_units(group: Group, floor: float) -> int:
    """Return the units that a group keeps at least."""
    return max(1, math.ceil(floor * group.units - 1e-9))


def widths_allowed(group: Group, floor: float, multiple: int | None) -> list[int]:
    """Return the numbers of units that a group may keep, falling, from all of them.

    Args:
        group: The group.
        floor: Least fraction to keep.
        multiple: Widths below the first one are multiples of it; None is 8 for groups of at least
            64 units, else 1.
    """
    if multiple is None:
        multiple = MULTIPLE if group.units >= _WIDE and group.kind != "heads" else 1
    least = least_units(group, floor)
    allowed = range(group.units // multiple * multiple, 0, -multiple)
    return [group.units, *(width for width in allowed if least <= width < group.units)]


def choose_widths(
    groups: Sequence[Group],
    costs: Mapping[str, Tensor],
    sizes: Sizes,
    sparsity: float,
    *,
    what: str,
    scope: str,
    floor: float,
    multiple: int | None,
) -> dict[str, int]:
    """Return the units that each group keeps.

    Args:
        groups: The groups.
        costs: Name of a group to the costs of its units, in the order in which they go.
        sizes: Sizes of the model.
        sparsity: Fraction of `what` to remove.
        what: `"units"` of the groups, `"parameters"`, `"macs"` or `"latency"` of the model.
        scope: `"global"`: all groups compete; `"layer"`: each one keeps the same fraction, of units
            the nearest to the goal; `"uniform"`: the same, but never more than the goal.
        floor: Least fraction of a group to keep.
        multiple: See `widths_allowed`.

    Raises:
        InvalidArgument: So much cannot be removed.
    """
    allowed = {group.name: widths_allowed(group, floor, multiple) for group in groups}
    base = sizes.total(what)
    goal = base * (1 - sparsity) + 1e-6
    fewest = {name: widths[-1] for name, widths in allowed.items()}
    least = sizes.total(what, fewest)
    if least > goal:
        raise InvalidArgument(
            f"sparsity must be at most {math.floor((1 - least / base) * 1000) / 1000:g} of the "
            f"{what} here, got {sparsity:g}: the other ones are not in units that can be removed, "
            "or kept by floor or multiple"
        )
    if scope == "layer" and what == "units":
        return _nearest(groups, allowed, goal / base)
    if scope in ("layer", "uniform"):
        return _largest_uniform(groups, allowed, sizes, goal, what)
    kept = {group.name: group.units for group in groups}
    left = base
    waiting: list[tuple[float, int, str]] = []
    reached = dict.fromkeys(kept, -math.inf)
    place = dict.fromkeys(kept, 0)
    order = {group.name: i for i, group in enumerate(groups)}

    def offer(name: str) -> None:
        if place[name] + 1 == len(allowed[name]):
            return
        fewer = allowed[name][place[name] + 1]
        total = kept_total[name]
        cost = float(costs[name][total - kept[name] : total - fewer].sum())
        rate = cost / max(sizes.saving(what, kept, name, fewer), 1e-30)
        # A later step is not taken before an earlier one, however cheap it is.
        reached[name] = max(reached[name], rate)
        heapq.heappush(waiting, (reached[name], order[name], name))

    kept_total = dict(kept)
    for name in kept:
        offer(name)
    while left > goal and waiting:  # without steps left it is met, but for rounding errors
        _, _, name = heapq.heappop(waiting)
        place[name] += 1
        fewer = allowed[name][place[name]]
        left -= sizes.saving(what, kept, name, fewer)
        kept[name] = fewer
        offer(name)
    return kept


def candidate_widths(
    groups: Sequence[Group], choose: Callable[..., dict[str, int]], scope: str, floor: float
) -> list[dict[str, int]]:
    """Return different widths that meet a budget, for `scope="auto"` several.

    They lie between those of global competition and the same fraction of every group: costs are
    those of one group at a time, and what is lost by a deep cut of one group is more than their
    sum. Each candidate has a higher floor than the one before.

    Args:
        groups: The groups.
        choose: `choose_widths` with all arguments but `scope` and `floor`.
        scope: `"auto"`, or one of `choose_widths`.
        floor: Least fraction of a group to keep.

    Raises:
        InvalidArgument: So much cannot be removed.
    """
    if scope != "auto":
        return [choose(scope=scope, floor=floor)]
    uniform = choose(scope="uniform", floor=floor)
    fraction = sum(uniform.values()) / sum(group.units for group in groups)
    found = [choose(scope="global", floor=floor)]
    for step in _STEPS:
        # A floor above the fraction of some group, whose widths are coarse, may be infeasible.
        with contextlib.suppress(InvalidArgument):
            higher = max(floor, floor + step * (fraction - floor))
            found.append(choose(scope="global", floor=higher))
    return [w for i, w in enumerate([*found, uniform]) if w not in found[:i]]


def _largest_uniform(
    groups: Sequence[Group],
    allowed: Mapping[str, Sequence[int]],
    sizes: Sizes,
    goal: float,
    what: str,
) -> dict[str, int]:
    """Return the largest fraction of every group, rounded, that meets the goal."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        meets = sizes.total(what, _nearest(groups, allowed, middle)) <= goal
        low, high = (middle, high) if meets else (low, middle)
    return _nearest(groups, allowed, low)


def _nearest(
    groups: Sequence[Group], allowed: Mapping[str, Sequence[int]], fraction: float
) -> dict[str, int]:
    return {
        group.name: min(allowed[group.name], key=lambda width: abs(width - fraction * group.units))
        for group in groups
    }
