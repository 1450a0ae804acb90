"""The scores of units, and the weights that make up for removed ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches
from fastsal.pruning.structured.budget import least_units
from fastsal.pruning.structured.collecting import Statistics, collect_statistics, in_passes
from fastsal.pruning.structured.find import Units
from fastsal.pruning.structured.folding import Damped, fold, joint_costs
from fastsal.pruning.structured.groups import Group, names_of
from fastsal.pruning.structured.settings import Settings
from fastsal.pruning.structured.simple import simple_scores
from fastsal.utils.float64 import in_float64
from fastsal.utils.progress import reporter

Change = tuple[Tensor, Tensor]  # a tensor of a model, and its new value


class Work:
    """Statistics, scores and folds of the groups of a model.

    Args:
        model: The model with all units; not changed.
        units: Its groups.
        how: Checked settings.
        batches: Images. Statistics that do not fit into memory together are collected again.

    Attributes:
        costs: Name of a group to the costs of its units in the order in which they go.
        samples: Number of images.
    """

    def __init__(self, model: nn.Module, units: Units, how: Settings, batches: Batches) -> None:
        self._model, self._how, self._batches = model, how, batches
        self._groups, self._normalization = units.groups, units.normalization
        room = how.memory_budget
        assert not isinstance(room, str)
        self._passes = in_passes(model, names_of(units.groups), room)
        self._kept: dict[str, Statistics] | None = None
        self._orders: dict[str, Tensor] = {}
        self.costs: dict[str, Tensor] = {}
        self.samples = 0

    def score(self) -> None:
        """Score all groups."""
        how = self._how
        is_curved = how.criterion == "joint" and how.weighting == "features"
        for statistics in self._collected(is_curved=is_curved):
            for number, group in enumerate(self._groups):
                if group.consumers[0] in statistics:
                    found = self._scored(group, statistics[group.consumers[0]], how.seed + number)
                    self._orders[group.name], self.costs[group.name] = found
            if len(self._passes) == 1:
                self._kept = statistics

    def removed(self, widths: dict[str, int]) -> dict[str, Tensor]:
        """Return the units that go, sorted, by the name of their group."""
        return {
            g.name: self._orders[g.name][: g.units - widths[g.name]].sort().values
            for g in self._groups
        }

    def cuts(self, widths: dict[str, int]) -> list[tuple[Group, Tensor]]:
        """Return the groups that lose units, and the units that they keep, sorted."""
        found = []
        gone = self.removed(widths)
        for group in self._groups:
            if len(gone[group.name]):
                mask = torch.ones(group.units, dtype=torch.bool, device="cpu")
                mask[gone[group.name]] = False
                found.append((group, mask.nonzero()[:, 0]))
        return found

    def fold(self, widths: dict[str, int]) -> list[Change]:
        """Return the weights of the consumers that make up for the units that go, if asked for.

        Statistics that are not kept are collected again.
        """
        cuts = self.cuts(widths)
        if not self._how.compensate or not cuts:
            return []
        changes: list[Change] = []
        again = self._collected(is_curved=False) if self._kept is None else [self._kept]
        for statistics in again:
            for group, kept in cuts:
                for name in group.consumers:
                    if name in statistics:
                        changes += self._folded(group, kept, name, statistics[name])
        return changes

    def _collected(self, *, is_curved: bool) -> Iterator[dict[str, Statistics]]:
        how = self._how
        scorers = {group.consumers[0] for group in self._groups} if is_curved else set()
        for some in self._passes:
            with reporter(how.progress, "activations") as report:
                statistics, self.samples = collect_statistics(
                    self._model,
                    some,
                    self._batches,
                    how.samples,
                    curvature=scorers.intersection(some),
                    seed=how.seed,
                    report=report,
                )
            yield statistics

    def _scored(self, group: Group, statistics: Statistics, seed: int) -> tuple[Tensor, Tensor]:
        """Return the order in which units go, and their costs."""
        name = group.consumers[0]
        if self._how.criterion == "joint":
            return joint_costs(
                self._weight(name),
                self._damped(name, statistics),
                statistics.curvature,
                group.units,
                least_units(group, self._how.floor),
            )
        variance = statistics.inputs.covariance().diagonal()
        scores = simple_scores(self._model, group, self._how.criterion, variance, seed)
        costs, order = scores.sort(stable=True)
        return order, costs

    def _folded(
        self, group: Group, kept: Tensor, name: str, statistics: Statistics
    ) -> list[Change]:
        """Return tensors of a consumer and what they become."""
        layer = self._model.get_submodule(name)
        damped = self._damped(name, statistics)
        columns = group.kept_columns(layer, kept)
        weight, shift = fold(self._weight(name), damped, columns)
        own: Tensor = layer.weight  # type: ignore[assignment]
        found = [(own, weight.view(own.shape).to(own.dtype).to(own.device))]
        if shift is not None:
            bias = layer.bias
            if bias is None:  # the normalization after it subtracts its mean
                normalization = self._model.get_submodule(self._normalization[name])
                bias, shift = normalization.running_mean, -shift
            assert isinstance(bias, Tensor)
            found.append((bias, (in_float64(bias.cpu()) + shift).to(bias.dtype).to(bias.device)))
        return found

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self._model.get_submodule(name).weight  # type: ignore[assignment]
        return in_float64(weight.detach().cpu()).flatten(1)

    def _damped(self, name: str, statistics: Statistics) -> Damped:
        layer = self._model.get_submodule(name)
        # Without a fold nothing takes the mean over: its loss is part of the cost.
        takes_mean = layer.bias is not None or name in self._normalization
        return Damped.of(
            statistics.inputs, self._how.damping, has_bias=takes_mean and self._how.compensate
        )


def applied(changes: Iterable[Change]) -> None:
    """Give tensors of a model their new values."""
    with torch.no_grad():
        for tensor, value in changes:
            tensor.data = value
