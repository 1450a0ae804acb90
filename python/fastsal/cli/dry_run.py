"""What a study needs, in one line each: `fastsal sweep --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastsal.study.calibration import Estimate
    from fastsal.study.needs import Needs
    from fastsal.study.settings.schema import Study

STATUS_MISSING = 1


def print_needs(
    ctx: click.Context, study: Study, out: Path, *, as_json: bool, calibrates: bool
) -> None:
    """Print what a study needs without writing anything; exit with 1 if something is missing.

    Args:
        ctx: Context of the command.
        study: Settings of the study.
        out: Results folder.
        as_json: Whether to print one JSON object.
        calibrates: Whether to estimate time and memory in short trials.
    """
    from fastsal.cli.output import emit
    from fastsal.study.calibration import estimate
    from fastsal.study.needs import needs_of

    needs, tasks = needs_of(study, out)
    if not as_json:
        for line in _lines(study, needs, out):
            click.echo(line)
    found = estimate(study, needs, tasks) if calibrates else None
    if as_json:
        emit(_facts(study, needs, found, out))
    elif found is not None and needs.left:
        for line in _estimated(found, has_images=tasks is not None):
            click.echo(line)
    if needs.missing:
        ctx.exit(STATUS_MISSING)


def _lines(study: Study, needs: Needs, out: Path) -> Iterator[str]:
    axes = {
        "models": study.models, "sources": study.sources, "criteria": study.criteria,
        "rounds": study.rounds, "seeds": study.seeds, "sparsities": study.sparsities,
    }  # fmt: skip
    grid = " x ".join(f"{len(values)} {name}" for name, values in axes.items() if len(values) > 1)
    yield (
        f"{study.name}: {len(needs.cells)} cells, {len(study.tasks)} tasks each"
        f"{f' ({grid})' if grid else ''}; results are written to {out}"
    )
    yield f"done: {len(needs.done)} of {len(needs.cells)} cells"
    counts = [c for c in needs.images.values() if c is not None]
    totals = {split: sum(c[split] for c in counts) for split in ("prune", "fit", "tune", "test")}
    unknown = len(needs.images) - len(counts)
    yield (
        f"images: {totals['prune']:,} to prune, {totals['fit']:,} to fit heads, "
        f"{totals['tune']:,} to fine-tune, {totals['test']:,} to test"
        + (" (as many a class as ImageNet has)" if needs.is_assumed and counts else "")
        + (f"; unknown for {unknown} tasks" if unknown else "")
    )
    for line in needs.downloads:
        yield f"download: {line}"
    for line in needs.missing:
        yield f"missing: {line}"


def _estimated(found: Estimate, *, has_images: bool) -> Iterator[str]:
    from fastsal.cli.plan import duration
    from fastsal.utils.machine import torch_threads
    from fastsal.utils.sizes import gib

    threads = torch_threads()
    place = f"{found.device}, {threads} thread{'s' * (threads != 1)}"
    each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in found.seconds.items())
    reading = "" if has_images else " without reading images"
    yield (
        f"time: about {duration(sum(found.seconds.values()))} in one process on {place}{reading} "
        f"({each})"
    )
    gpu = f", {gib(found.device_memory)} on {found.device}" if found.device_memory else ""
    yield f"memory: about {gib(found.memory)} a process{gpu}"


def _facts(study: Study, needs: Needs, found: Estimate | None, out: Path) -> dict[str, Any]:
    cells = [cell.facts() for cell in needs.cells]
    for cell in cells:
        del cell["cell"]  # a digest that includes the files, which are not read here
    facts = {
        "study": study.name,
        "out": str(out),
        "cells": cells,
        "done": len(needs.done),
        "images": needs.images,
        "assumes_imagenet": needs.is_assumed,
        "downloads": needs.downloads,
        "missing": needs.missing,
    }
    if found is not None:
        facts |= {
            "device": found.device,
            "seconds": found.seconds,
            "memory_bytes": found.memory,
            "device_memory_bytes": found.device_memory,
        }
    return facts
