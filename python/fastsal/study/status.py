"""The status of a running study: what is done, what is computed now, and the best results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastsal.study.cells import Cell
from fastsal.study.folder_format import DONE, FAILED, SOURCE, TRANSFER


@dataclass(frozen=True)
class Best:
    """The best criterion so far for a model at a sparsity.

    Attributes:
        model: Name of the model.
        sparsity: Sparsity of the grid.
        done: Number of cells with a result.
        cells: Number of cells.
        criterion: Name of the criterion with the highest mean accuracy on unseen tasks, or on the
            source if there are none; None before the first result.
        source: Its mean accuracy on the tasks of the source, 0 to 1, after fine-tuning if the study
            has it.
        unseen: The same on the other tasks; None if there are none.
    """

    model: str
    sparsity: float
    done: int
    cells: int
    criterion: str | None = None
    source: float | None = None
    unseen: float | None = None


@dataclass(frozen=True)
class Status:
    """The status of a study in one process.

    Attributes:
        name: Name of the study.
        cells: All cells.
        results: `{key: result}`; None for cells without a result.
        todo: Number of cells without a result when the process started.
        left: Number of cells without a result now.
        here: Cell that this process computes; None while it waits.
        others: `{key: process}` of the cells that other processes compute.
    """

    name: str
    cells: Sequence[Cell]
    results: Mapping[str, Mapping[str, Any] | None]
    todo: int
    left: int
    here: Cell | None
    others: Mapping[str, str]

    @property
    def failed(self) -> int:
        """Number of failed cells."""
        return sum(r is not None and r["status"] == FAILED for r in self.results.values())

    def best(self) -> list[Best]:
        """Return the best criterion so far of each model and sparsity, in the order of the grid."""
        groups: dict[tuple[str, float], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault((cell.model.name, cell.sparsity), []).append(cell)
        return [self._best(*key, cells) for key, cells in groups.items()]

    def _best(self, model: str, sparsity: float, cells: list[Cell]) -> Best:
        found: dict[str, dict[str, list[float]]] = {}
        done = 0
        for cell in cells:
            result = self.results[cell.key]
            if result is None:
                continue
            done += 1
            if result["status"] != DONE:
                continue
            name = cell.criterion.name + (f", {cell.rounds} rounds" if cell.rounds > 1 else "")
            roles = found.setdefault(name, {SOURCE: [], TRANSFER: []})
            for row in result["tasks"]:
                roles[row["role"]].append(row["pruned"] if row["tuned"] is None else row["tuned"])
        means = {
            name: (_mean(roles[SOURCE]), _mean(roles[TRANSFER])) for name, roles in found.items()
        }
        if not means:
            return Best(model, sparsity, done, len(cells))
        criterion = max(means, key=lambda name: means[name][1] or means[name][0] or 0.0)
        return Best(model, sparsity, done, len(cells), criterion, *means[criterion])


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
