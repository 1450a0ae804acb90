"""Run the unfinished cells of a study, storing each cell as soon as it is finished."""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsal.errors import FastsalError
from fastsal.models.weights import save_weights
from fastsal.pruning.shelf import restore
from fastsal.study.backbones import check_files, digest_of
from fastsal.study.cells import Cell, cells_of, digests_of_criteria
from fastsal.study.diagnostics import loss_lines_of, overlaps_of
from fastsal.study.folder_format import DONE, FAILED
from fastsal.study.images import class_map_digests, digests_of, images_of, open_tasks, store_splits
from fastsal.study.opened import Opened
from fastsal.study.prune_cell import Pruned, plain_masks, prune_cell
from fastsal.study.settings.schema import Study
from fastsal.study.sources import PruningSource
from fastsal.study.status import Status
from fastsal.study.store import Store, check_store, digest_of_results
from fastsal.study.tables import Rows, require_tables, tables_of, write_tables
from fastsal.study.tuning import check_tuning, tune
from fastsal.study.turns import Turns
from fastsal.study.waiting import POLL, Waiting
from fastsal.transfer.evaluation import Measurement
from fastsal.utils.claims import Claims
from fastsal.utils.devices import device_facts, resolve_device
from fastsal.utils.machine import machine, peak_memory, torch_threads, versions
from fastsal.utils.paths import user_path
from fastsal.utils.progress import Report, reporter

TABLES_CLAIM = "tables"  # no cell has this key
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
        elsewhere: Number of cells that other processes are still computing; 0 after waiting.
        has_written: Whether this run wrote the tables; of processes that share a study, one does.
    """

    cells: int
    done: int
    failed: dict[str, str]
    rows: list[dict[str, Any]]
    warned: list[str]
    seconds: float
    elsewhere: int = 0
    has_written: bool = True

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
    wait: bool = True,
    progress: bool | Report = False,
    watch: Callable[[Status], None] | None = None,
) -> Summary:
    """Prune, evaluate, fine-tune and evaluate again, for every cell of a study.

    Each cell is stored as soon as it is finished. Rerun an interrupted study with the same
    arguments to resume it; the tables are the same as without the interruption. A cell that raises
    any exception is recorded as failed and does not stop the others.

    Several processes, also on machines that share the folder, share the cells of a study: each cell
    is computed by one of them, and that of a process that is killed by another one. The last one to
    finish writes the tables, which are those of a single process.

    The warnings of a cell are recorded in its file. For this the warning filters of the process are
    changed while a cell runs, so that other threads should not change them.

    Args:
        study: Settings of the study.
        out: Results folder; created if it does not exist.
        command: Command line that reproduces the study, for the report.
        retry: Whether to recompute cells that failed before.
        wait: Whether to wait for cells of other processes, which may be killed, when no cell is
            left to start. False returns at once; `Summary.elsewhere` has their number, and the last
            process writes the tables.
        progress: True for a progress bar, or a callback with the numbers of finished cells and of
            all cells to compute.
        watch: Callback with the status of the study, called when a cell starts or ends and while
            this process waits.

    Returns:
        Summary of the run.

    Raises:
        InvalidArgument: The folder holds other files, or the results of another study, or this
            machine does not have the device.
        FastsalError: A model or a task cannot be opened.
        OSError: A result cannot be written; finished cells are kept.
    """
    start = time.perf_counter()
    out = user_path(out)
    require_tables()
    check_files(study)
    device = resolve_device(study.device)
    identity = {k: v for k, v in study.settings().items() if k not in GRID}
    # Nothing is written before all is open, so that another folder is not needed for a study whose
    # mistake is mended.
    check_store(out, identity)
    study = replace(study, device=str(device))
    tasks = open_tasks(study, out)
    check_tuning(study, tasks)
    files = {f"task {name}": digest for name, digest in digests_of(tasks).items()}
    files |= class_map_digests(study)
    files |= {f"model {m.name}": digest_of(study, m) for m in study.models}
    files |= digests_of_criteria(study)
    cells = cells_of(study, files)
    store = Store(out, identity)
    store_splits(tasks, store.folder)
    with store.claims() as claims:
        turns = Turns(store, claims, cells, retry=retry)
        total = len(turns.left)

        def tell(here: Cell | None = None) -> None:
            report(total - len(turns.left), total)
            if watch is not None:
                left = len(turns.left)
                watch(Status(study.name, cells, turns.results, total, left, here, turns.others))

        with reporter(progress, study.name, "cells") as report:
            # Only cells to compute count, so that the estimate of the remaining time is right.
            tell()
            opened = Opened(study, store, tasks)
            waits = Waiting(bool(progress))
            while turns.left:
                cell = turns.next()
                tell(cell)
                if cell is not None:
                    turns.finish(cell, _result(store, opened.source(cell), cell))
                    tell()
                elif not wait and turns.left.keys() <= turns.others.keys():
                    break
                else:
                    waits.on(turns.others)
        tables = tables_of(study.name, [(c, r) for c in cells if (r := turns.results[c.key])])
        has_written = False
        if not turns.left:
            is_shared = len(turns.computed) < total
            has_written = _write_once(
                study, store, claims, turns.results, tables, command, is_shared=is_shared
            )
            claims.clear(turns.results)
    results = turns.results
    failed = {c.key: r["error"] for c in cells if (r := results[c.key]) and r["status"] == FAILED}
    return Summary(
        cells=len(cells),
        done=len(turns.computed),
        failed=failed,
        rows=tables["results"],
        warned=[c.key for c in cells if (r := results[c.key]) and r.get("warnings")],
        seconds=time.perf_counter() - start,
        elsewhere=len(turns.left),
        has_written=has_written,
    )


def _write_once(
    study: Study,
    store: Store,
    claims: Claims,
    results: Mapping[str, dict[str, Any] | None],
    tables: Mapping[str, Rows],
    command: str,
    *,
    is_shared: bool,
) -> bool:
    """Write the tables and `study.json`, unless a process that shared the cells has done so."""
    while not claims.take(TABLES_CLAIM):
        time.sleep(POLL)
    digest = digest_of_results(results)
    is_mine = not is_shared or not store.describes(digest)
    if is_mine:
        write_tables(store.folder, tables)
        found = [r for r in results.values() if r]
        store.describe(
            {
                "name": study.name,
                "command": command,
                "settings": study.settings(),
                "models": {r["model"]: r["sizes"] for r in found if "sizes" in r},
                "cells": len(results),
                "failures": sum(r["status"] == FAILED for r in found),
                "seconds": round(sum(r["seconds"] for r in found), 3),
                "peak_memory_bytes": max(r["peak_memory_bytes"] or 0 for r in found),
                "versions": versions(),
                "machine": {**machine(), **device_facts(torch.device(study.device))},
                "results": digest,
            }
        )
    claims.finish(TABLES_CLAIM)
    return is_mine


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
