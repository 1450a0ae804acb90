"""Prune one cell of a study, with the statistics that it shares with other cells."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from fastsal.pruning.job import Job
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.reconstruction.stage import ReconstructionStage
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.refit.stage import RefitStage
from fastsal.pruning.rounds import RoundStatistics, prune_in_rounds, rising_goals
from fastsal.study.cells import Cell
from fastsal.study.settings.schema import RefitSettings
from fastsal.study.sources import PruningSource
from fastsal.transfer.headed import PREFIX


@dataclass(frozen=True)
class Pruned:
    """Result of pruning a cell.

    Attributes:
        masks: Masks, with parameter names of `Headed`.
        facts: Values of columns of `results`.
        layers: Rows of `layers`, one per parameter, in the order of the network.
    """

    masks: Masks
    facts: dict[str, Any]
    layers: list[dict[str, Any]]


def prune_cell(source: PruningSource, cell: Cell) -> Pruned:
    """Prune the dense backbone of a source in place, with the settings of a cell."""
    job = source.job(cell.criterion, cell.seed)
    how = cell.criterion.refit
    if how is not None or cell.criterion.reconstruct:
        job = replace(job, batches=source.all_images())
    if how is not None:
        job = replace(job, refit=_stage(how, job, cell.seed))
    if cell.criterion.reconstruct:
        job = replace(job, reconstruction=ReconstructionStage(None, cell.seed, None))
    recipe = job.recipe
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
    with job.all_or_nothing() as dense:
        masks, _, history = prune_in_rounds(job, goals, dense=dense, recalibrate=False, find=find)
    taken = time.perf_counter() - start - waited
    # The time of the shared statistics at the dense weights counts in full for every cell.
    statistics = source.seconds + sum(own) if recipe.needs_fisher else 0.0
    last = history[-1]
    is_shared = recipe.needs_fisher and source.shared is not None
    facts = {
        "samples": last.samples,
        "damping": last.damping,
        "sparsity_reached": masks.sparsity,
        "predicted_increase": _sum(entry.predicted_increase for entry in history),
        "statistics_bytes": source.dense_fisher().nbytes if is_shared else 0,
        "seconds_statistics": statistics,
        "seconds_prune": taken,
    }
    layers = [
        {"layer": name.removeprefix(PREFIX), "weights": mask.numel(), "pruned": int((~mask).sum())}
        for name, mask in masks.items()
    ]
    return Pruned(masks, facts, layers)


def _stage(how: RefitSettings, job: Job, seed: int) -> RefitStage:
    """Return how to refit the model of a job, which is dense now."""
    lr: Any = "auto" if how.lr is None else how.lr
    steps: Any = "auto" if how.steps is None else how.steps
    settings = Refit(
        how.windows,
        steps=steps,
        batch_size=how.batch_size,
        lr=lr,
        between_rounds=how.between_rounds,
    )
    return RefitStage.of(
        settings, job.model, autocast=None, progress=False, seed=seed, budget=None, kept=0
    )


def plain_masks(masks: Masks) -> Masks:
    """Return masks with the parameter names of the backbone."""
    recipe = dict(masks.recipe)
    if "input_axes" in recipe:
        axes = recipe["input_axes"]
        recipe["input_axes"] = {name.removeprefix(PREFIX): a for name, a in axes.items()}
    return Masks({name.removeprefix(PREFIX): mask for name, mask in masks.items()}, recipe)


def _sum(values: Any) -> float | None:
    found = list(values)
    return None if any(value is None for value in found) else float(sum(found))
