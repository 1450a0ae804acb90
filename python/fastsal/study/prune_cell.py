"""Pruning of one cell, with statistics that it shares with others."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from fastsal.gradients import select_parameters
from fastsal.gradients.losses import cross_entropy
from fastsal.pruning.job import Job
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.rounds import RoundStatistics, prune_in_rounds, rising_goals
from fastsal.study.cells import Cell
from fastsal.study.sources import Source
from fastsal.transfer.headed import PREFIX


@dataclass(frozen=True)
class Pruned:
    """What pruning a cell came to.

    Attributes:
        masks: by the names of `Headed`.
        facts: columns of the cell.
        layers: one row a parameter, in the order of the network.
    """

    masks: Masks
    facts: dict[str, Any]
    layers: list[dict[str, Any]]


def prune_cell(source: Source, cell: Cell) -> Pruned:
    """Prune the dense backbone of a source in place, as a cell says."""
    how = cell.criterion
    recipe = Recipe.of(
        how.criterion,
        compensate=how.compensate,
        damping=how.damping,
        ranking={"scope": how.scope, "pattern": how.pattern, "floor": how.floor},
        parameters=source.parameters,
        block_size=source.study.block_size,
        seed=cell.seed,
    )
    model = source.models[0]
    chosen = select_parameters(model, source.parameters)
    job = Job(model, None, None, recipe, chosen, {"curvature": source.curvature}, cross_entropy)
    waited = 0.0
    own: list[float] = []

    def find(number: int, *, holds_out: bool) -> RoundStatistics:
        nonlocal waited
        if not recipe.needs_fisher:
            return RoundStatistics()
        start = time.perf_counter()
        found = source.find(number, dense=number == 1)
        taken = time.perf_counter() - start
        waited += taken
        if number > 1:
            own.append(taken)
        return found if holds_out else RoundStatistics(found.joined(), found.joined)

    start = time.perf_counter()
    goals = rising_goals(cell.sparsity, cell.rounds)
    masks, _, history = prune_in_rounds(job, goals, recalibrate=False, find=find)
    taken = time.perf_counter() - start - waited
    # Statistics at the dense weights are shared and count in full; those after are a cell's own.
    statistics = source.seconds + sum(own) if recipe.needs_fisher else 0.0
    last = history[-1]
    fisher = source.shared.joined() if recipe.needs_fisher and source.shared is not None else None
    facts = {
        "samples": last.samples,
        "damping": last.damping,
        "sparsity_reached": masks.sparsity,
        "predicted_increase": _sum(entry.predicted_increase for entry in history),
        "statistics_bytes": 0 if fisher is None else fisher.nbytes,
        "seconds_statistics": statistics,
        "seconds_prune": taken,
    }
    layers = [
        {"layer": name.removeprefix(PREFIX), "weights": mask.numel(), "pruned": int((~mask).sum())}
        for name, mask in masks.items()
    ]
    return Pruned(masks, facts, layers)


def plain_masks(masks: Masks) -> Masks:
    """Return the masks by the backbone's own names."""
    return Masks({name.removeprefix(PREFIX): mask for name, mask in masks.items()}, masks.recipe)


def _sum(values: Any) -> float | None:
    found = list(values)
    return None if any(value is None for value in found) else float(sum(found))
