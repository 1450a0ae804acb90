"""Running a study: every cell that is not done yet, one after another, each kept when it is."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fastsal.errors import FastsalError
from fastsal.models.weights import save_weights
from fastsal.pruning.shelf import restore
from fastsal.study.backbones import Backbone, check_files, digest_of, open_backbone
from fastsal.study.cells import Cell, cells_of
from fastsal.study.images import digests_of, images_of, open_tasks, parts_of
from fastsal.study.landscape import landscape_of, overlap_of
from fastsal.study.prune_cell import Pruned, plain_masks, prune_cell
from fastsal.study.settings.schema import SourceSettings, Study
from fastsal.study.sources import Source
from fastsal.study.store import Store
from fastsal.study.tables import require_tables, write_tables
from fastsal.study.tuning import tune
from fastsal.transfer.evaluation import Measurement
from fastsal.transfer.tasks import Task
from fastsal.utils.choices import Curvature
from fastsal.utils.machine import machine, peak_memory, torch_threads, versions
from fastsal.utils.progress import Report, reporter

GRID = ("models", "sources", "criteria", "sparsities", "seeds", "rounds", "save")


@dataclass(frozen=True)
class Summary:
    """What a run of a study did.

    Attributes:
        cells: of the study.
        done: in this run; the others were there.
        failed: cells that are recorded as failed, with what went wrong.
        rows: of the table of results.
        warned: cells whose work warned of something; their files say what.
        seconds: of this run.
    """

    cells: int
    done: int
    failed: dict[str, str]
    rows: list[dict[str, Any]]
    warned: list[str]
    seconds: float


def run_study(
    study: Study,
    out: Path,
    *,
    command: str = "",
    retry: bool = False,
    progress: bool | Report = False,
) -> Summary:
    """Prune, evaluate, fine-tune and evaluate again, for every cell of a study.

    Each cell is written when it is done. A run that was cut off is gone on with by the same call,
    to the same table. A cell that fails is recorded and does not stop the others.

    Args:
        study: its settings.
        out: the folder of the results.
        command: to reproduce it, for the report.
        retry: whether cells that failed before are tried again.
        progress: a bar, or a function of cells done and those to do.

    Returns:
        What was done.

    Raises:
        InvalidArgument: the folder holds something else, or the results of another study.
        FastsalError: a model or a task cannot be opened.
        OSError: a result cannot be written; what was done before is kept.
    """
    start = time.perf_counter()
    require_tables()
    check_files(study)
    identity = {k: v for k, v in study.settings().items() if k not in GRID}
    store = Store(out, identity)
    tasks = open_tasks(study, store.folder)
    files = {f"task {name}": digest for name, digest in digests_of(tasks).items()}
    files |= {f"model {m.name}": digest_of(study, m) for m in study.models}
    cells = cells_of(study, files)
    results = {cell.key: store.read(cell.key) for cell in cells}

    def is_open(cell: Cell) -> bool:
        found = results[cell.key]
        return found is None or (retry and found["status"] == "failed")

    left = [cell for cell in cells if is_open(cell)]
    # Cells that were there are not counted, so that the time that is left is right.
    with reporter(progress, study.name, "cells") as report:
        report(0, len(left))
        for done, (source, cell) in enumerate(_with_sources(study, store, tasks, left), start=1):
            results[cell.key] = _result(store, source, cell)
            report(done, len(left))
    failed = {c.key: r["error"] for c in cells if (r := results[c.key]) and r["status"] == "failed"}
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
            "machine": machine(),
        }
    )
    warned = [c.key for c in cells if (r := results[c.key]) and r.get("warnings")]
    return Summary(len(cells), len(left), failed, rows, warned, seconds)


def _with_sources(
    study: Study, store: Store, tasks: Mapping[str, Task], cells: list[Cell]
) -> Iterator[tuple[Source | FastsalError, Cell]]:
    """Give each cell with its source, or with the error that there is instead of one.

    Cells of one model share it; those of one source and seed share their statistics.
    """
    for model, of_model in groupby(cells, key=lambda cell: cell.model):
        backbone: Backbone | FastsalError
        try:
            backbone = open_backbone(study, model, tasks, store.heads)
        except FastsalError as error:
            backbone = error
        for (settings, seed, curvature), group in groupby(
            of_model, key=lambda c: (c.source, c.seed, c.curvature)
        ):
            source: Source | FastsalError
            try:
                source = _opened(study, backbone, settings, tasks, seed, curvature)
            except FastsalError as error:
                source = error
            for cell in group:
                yield source, cell


def _opened(
    study: Study,
    backbone: Backbone | FastsalError,
    settings: SourceSettings,
    tasks: Mapping[str, Task],
    seed: int,
    curvature: Curvature,
) -> Source:
    if isinstance(backbone, FastsalError):
        raise backbone
    return Source(study, settings, backbone, parts_of(settings, tasks, seed), seed, curvature)


def _result(store: Store, source: Source | FastsalError, cell: Cell) -> dict[str, Any]:
    """Run one cell and keep what it came to."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            if isinstance(source, FastsalError):
                raise source
            result = _run(store, source, cell)
        result["warnings"] = [" ".join(str(w.message).split()) for w in heard]
    except FastsalError as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result = {
            "status": "failed",
            "error": message,
            "facts": {},
            "tasks": [{"error": message}],
        }
    result |= {
        "model": cell.model.name,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
    }
    result["facts"] |= {**versions(), "threads": torch_threads()}
    store.write(cell.key, result)
    return result


def _run(store: Store, source: Source, cell: Cell) -> dict[str, Any]:
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
        if study.landscape is not None and study.landscape.covers(
            cell.sparsity, cell.seed, study.seeds
        ):
            extra["landscape"] = landscape_of(source, states)
            if source.curvature == source.settings.curvature:
                extra["overlap"] = overlap_of(source)
    finally:
        restore(backbone.tensors, backbone.dense)
    facts = {**pruned.facts, **clock}
    on_source = [backbone.before[part.task].loss for part in source.parts]
    after = [zero_shot[part.task].loss for part in source.parts]
    facts["measured_increase"] = (sum(after) - sum(on_source)) / len(after)
    return {
        "status": "done",
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
    source: Source,
    name: str,
    zero_shot: Mapping[str, Measurement],
    tuned: Mapping[str, Measurement] | None,
) -> dict[str, Any]:
    backbone = source.backbone
    kinds = {task.name: task.head or source.study.head for task in source.study.tasks}
    return {
        "task": name,
        "role": "source" if name in source.settings.tasks else "transfer",
        "head": kinds[name],
        "classes": len(images_of(backbone.tasks[name].test).classes),
        "test_images": zero_shot[name].samples,
        "dense": backbone.before[name].accuracy,
        "pruned": zero_shot[name].accuracy,
        "tuned": None if tuned is None else tuned[name].accuracy,
    }


def _save(store: Store, source: Source, pruned: Pruned, cell: Cell) -> None:
    """Keep the masks of a cell, or its masks and last weights, where the study asks for it."""
    if source.study.save in ("masks", "models"):
        plain_masks(pruned.masks).save(store.folder / "masks" / f"{cell.key}.safetensors")
    if source.study.save == "models":
        path = store.folder / "models" / f"{cell.key}.safetensors"
        save_weights(source.backbone.model, path)
