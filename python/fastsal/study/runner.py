"""Run the unfinished cells of a study, storing each cell as soon as it is finished."""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fastsal.errors import FastsalError
from fastsal.models.weights import save_weights
from fastsal.pruning.shelf import restore
from fastsal.study.backbones import Backbone, check_files, digest_of, open_backbone
from fastsal.study.cells import Cell, cells_of, digests_of_criteria
from fastsal.study.diagnostics import loss_lines_of, overlaps_of
from fastsal.study.folder_format import DONE, FAILED
from fastsal.study.images import class_map_digests, digests_of, images_of, open_tasks, source_images
from fastsal.study.prune_cell import Pruned, plain_masks, prune_cell
from fastsal.study.settings.schema import SourceSettings, Study
from fastsal.study.sources import PruningSource
from fastsal.study.store import Store
from fastsal.study.tables import require_tables, write_tables
from fastsal.study.tuning import tune
from fastsal.transfer.evaluation import Measurement
from fastsal.transfer.tasks import Task
from fastsal.utils.choices import Curvature
from fastsal.utils.devices import device_facts, resolve_device
from fastsal.utils.machine import machine, peak_memory, torch_threads, versions
from fastsal.utils.progress import Report, reporter

GRID = ("models", "sources", "criteria", "sparsities", "seeds", "rounds", "save")


@dataclass(frozen=True, repr=False)
class Summary:
    """Summary of a run of a study.

    Attributes:
        cells: Number of cells of the study.
        done: Number of cells computed in this run, including failed ones.
        failed: `{cell: error}` of all failed cells.
        rows: Rows of the table `results`.
        warned: Cells with warnings; their files in `cells/` have the messages.
        seconds: Wall time of this run.
    """

    cells: int
    done: int
    failed: dict[str, str]
    rows: list[dict[str, Any]]
    warned: list[str]
    seconds: float

    def __repr__(self) -> str:
        return (
            f"Summary(cells={self.cells}, done={self.done}, failed={len(self.failed)}, "
            f"rows={len(self.rows)}, warned={len(self.warned)}, seconds={self.seconds:.1f})"
        )


def run_study(
    study: Study,
    out: str | os.PathLike[str],
    *,
    command: str = "",
    retry: bool = False,
    progress: bool | Report = False,
) -> Summary:
    """Prune, evaluate, fine-tune and evaluate again, for every cell of a study.

    Each cell is stored as soon as it is finished. Rerun an interrupted study with the same
    arguments to resume it; the tables are the same as without the interruption. A cell that raises
    any exception is recorded as failed and does not stop the others. One run at a time writes to a
    folder.

    The warnings of a cell are recorded in its file. For this the warning filters of the process are
    changed while a cell runs, so that other threads should not change them.

    Args:
        study: Settings of the study.
        out: Results folder; created if it does not exist.
        command: Command line that reproduces the study, for the report.
        retry: Whether to recompute cells that failed before.
        progress: True for a progress bar, or a callback with the numbers of finished cells and of
            all cells to compute.

    Returns:
        Summary of the run.

    Raises:
        InvalidArgument: The folder holds other files, or the results of another study, or another
            run writes to it, or this machine does not have the device.
        FastsalError: A model or a task cannot be opened.
        OSError: A result cannot be written; finished cells are kept.
    """
    start = time.perf_counter()
    require_tables()
    check_files(study)
    device = resolve_device(study.device)
    identity = {k: v for k, v in study.settings().items() if k not in GRID}
    store = Store(Path(out), identity)
    with store.locked():
        return _run_cells(
            replace(study, device=str(device)),
            store,
            start,
            command=command,
            retry=retry,
            progress=progress,
        )


def _run_cells(
    study: Study,
    store: Store,
    start: float,
    *,
    command: str,
    retry: bool,
    progress: bool | Report,
) -> Summary:
    """Run the unfinished cells of a study, and write its tables; the folder is locked."""
    tasks = open_tasks(study, store.folder)
    files = {f"task {name}": digest for name, digest in digests_of(tasks).items()}
    files |= class_map_digests(study)
    files |= {f"model {m.name}": digest_of(study, m) for m in study.models}
    files |= digests_of_criteria(study)
    cells = cells_of(study, files)
    results = {cell.key: store.read(cell.key) for cell in cells}

    def is_open(cell: Cell) -> bool:
        found = results[cell.key]
        return found is None or (retry and found["status"] == FAILED)

    left = [cell for cell in cells if is_open(cell)]
    # Only cells to compute count, so that the estimate of the remaining time is right.
    with reporter(progress, study.name, "cells") as report:
        report(0, len(left))
        for done, (source, cell) in enumerate(_with_sources(study, store, tasks, left), start=1):
            results[cell.key] = _result(store, source, cell)
            report(done, len(left))
    failed = {c.key: r["error"] for c in cells if (r := results[c.key]) and r["status"] == FAILED}
    rows = write_tables(
        store.folder, study.name, [(c, r) for c in cells if (r := results[c.key]) is not None]
    )
    seconds = time.perf_counter() - start
    store.describe(
        {
            "name": study.name,
            "command": command,
            "settings": study.settings(),
            "models": {r["model"]: r["sizes"] for r in results.values() if r and "sizes" in r},
            "cells": len(cells),
            "failures": len(failed),
            "seconds": round(sum(r["seconds"] for r in results.values() if r), 3),
            "peak_memory_bytes": max(r["peak_memory_bytes"] or 0 for r in results.values() if r),
            "versions": versions(),
            "machine": {**machine(), **device_facts(torch.device(study.device))},
        }
    )
    warned = [c.key for c in cells if (r := results[c.key]) and r.get("warnings")]
    return Summary(len(cells), len(left), failed, rows, warned, seconds)


def _with_sources(
    study: Study, store: Store, tasks: Mapping[str, Task], cells: list[Cell]
) -> Iterator[tuple[PruningSource | Exception, Cell]]:
    """Yield each cell with its source, or with the error that prevented opening it.

    Cells of one model share the backbone; cells of one source and seed share statistics.
    """
    for model, of_model in groupby(cells, key=lambda cell: cell.model):
        backbone: Backbone | Exception
        try:
            backbone = open_backbone(study, model, tasks, store.heads)
        except Exception as error:  # of the user's model too: recorded with its cells
            backbone = error
        for (settings, seed, curvature), group in groupby(
            of_model, key=lambda c: (c.source, c.seed, c.curvature)
        ):
            source: PruningSource | Exception
            try:
                source = _opened(study, backbone, settings, tasks, seed, curvature)
            except Exception as error:
                source = error
            for cell in group:
                yield source, cell


def _opened(
    study: Study,
    backbone: Backbone | Exception,
    settings: SourceSettings,
    tasks: Mapping[str, Task],
    seed: int,
    curvature: Curvature,
) -> PruningSource:
    if isinstance(backbone, Exception):
        raise backbone
    images = source_images(settings, tasks, seed)
    return PruningSource(study, settings, backbone, images, seed, curvature)


def _result(store: Store, source: PruningSource | Exception, cell: Cell) -> dict[str, Any]:
    """Compute one cell and store its result, also where it fails."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if isinstance(source, Exception):
                raise source
            result = _run(store, source, cell)
        except Exception as error:  # anything at all, so that the other cells are computed
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            result = {
                "status": FAILED,
                "error": message,
                "facts": {},
                "tasks": [{"error": message}],
            }
            if not isinstance(error, FastsalError):
                result["traceback"] = traceback.format_exception(error)
    result |= {
        "warnings": [" ".join(str(w.message).split()) for w in caught],
        "model": cell.model.name,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
    }
    result["facts"] |= {**versions(), "threads": torch_threads()}
    if not isinstance(source, Exception):
        result["facts"]["device"] = source.study.device
    store.write(cell.key, result)
    return result


def _run(store: Store, source: PruningSource, cell: Cell) -> dict[str, Any]:
    study, backbone = source.study, source.backbone
    clock: dict[str, float] = {}

    def measured() -> dict[str, Measurement]:
        start = time.perf_counter()
        found = backbone.measure()
        clock["seconds_evaluate"] = clock.get("seconds_evaluate", 0) + time.perf_counter() - start
        return found

    try:
        pruned = prune_cell(source, cell)
        zero_shot = measured()
        states = {"dense": backbone.dense, "pruned": backbone.state()}
        tuned: dict[str, Measurement] | None = None
        if study.finetune is not None:
            start = time.perf_counter()
            tune(source, pruned.masks, study.finetune)
            clock["seconds_finetune"] = time.perf_counter() - start
            tuned = measured()
            states["tuned"] = backbone.state()
        pruned.masks.verify(source.models[0])
        _save(store, source, pruned, cell)
        extra: dict[str, Any] = {}
        if study.diagnostics is not None and study.diagnostics.covers(
            cell.sparsity, cell.seed, study.seeds
        ):
            extra["loss_line"] = loss_lines_of(source, states)
            if source.curvature == source.settings.curvature:
                extra["overlap"] = overlaps_of(source)
    finally:
        restore(backbone.tensors, backbone.dense)
    facts = {**pruned.facts, **clock}
    dense = [backbone.before[images.task].loss for images in source.images]
    after = [zero_shot[images.task].loss for images in source.images]
    facts["measured_increase"] = (sum(after) - sum(dense)) / len(after)
    return {
        "status": DONE,
        "facts": facts,
        "sizes": {
            "weights": sum(p.numel() for p in backbone.model.parameters()),
            "prunable": pruned.masks.total,
        },
        "tasks": [_row(source, name, zero_shot, tuned) for name in backbone.tasks],
        "layers": pruned.layers,
        **extra,
    }


def _row(
    source: PruningSource,
    name: str,
    zero_shot: Mapping[str, Measurement],
    tuned: Mapping[str, Measurement] | None,
) -> dict[str, Any]:
    backbone = source.backbone
    kinds = {task.name: task.head or source.study.head for task in source.study.tasks}
    return {
        "task": name,
        "role": source.role(name),
        "head": kinds[name],
        "classes": len(images_of(backbone.tasks[name].test).classes),
        "test_images": zero_shot[name].samples,
        "dense": backbone.before[name].accuracy,
        "pruned": zero_shot[name].accuracy,
        "tuned": None if tuned is None else tuned[name].accuracy,
    }


def _save(store: Store, source: PruningSource, pruned: Pruned, cell: Cell) -> None:
    """Save the masks of a cell, or its masks and final weights, depending on `save`."""
    if source.study.save in ("masks", "models"):
        plain_masks(pruned.masks).save(store.folder / "masks" / f"{cell.key}.safetensors")
    if source.study.save == "models":
        path = store.folder / "models" / f"{cell.key}.safetensors"
        save_weights(source.backbone.model, path)
