"""The folder of a run: `model.safetensors`, `masks.safetensors`, `report.json`, and a figure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsal.errors import InvalidArgument
from fastsal.utils.atomic import note_written, sync_folder, temporary_beside
from fastsal.utils.digests import file_digest
from fastsal.utils.json_files import write_json

if TYPE_CHECKING:
    from torch import nn

    from fastsal.pruning.masks.masks import Masks

MODEL, MASKS, REPORT = "model.safetensors", "masks.safetensors", "report.json"
FIGURE = "safety.svg"
RUN_FILES = (MODEL, MASKS, FIGURE, REPORT)


def weights_file(path: Path) -> Path:
    """Return `path`, or the file of weights in it if it is the folder of a run."""
    return _within(path, MODEL) if path.is_dir() else path


def masks_file(path: Path) -> Path:
    """Return `path`, or the file of masks in it if it is the folder of a run."""
    return _within(path, MASKS) if path.is_dir() else path


def write_run(
    folder: Path,
    model: nn.Module,
    masks: Masks,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    draw: Callable[[Path], object] | None = None,
) -> None:
    """Write the files of a run to `folder`: all of them or none.

    They are written to a temporary folder, then moved. No file of an earlier run in `folder` is
    left; other files are not changed. `report` is extended by the SHA-256 of both tensor files.

    Args:
        folder: Folder of the run.
        model: The model.
        masks: Its masks.
        recipe: Entries to add to the recipe of the masks.
        report: Fields of the report.
        draw: Writes the figure of the run to a path; it may write nothing.
    """
    from fastsal.models.weights import save_weights

    target = folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Within an existing folder, which may be on a disk of its own.
    stage = temporary_beside(target / "run" if target.is_dir() else target)
    stage.mkdir()
    try:
        save_weights(model, stage / MODEL)
        masks.save(stage / MASKS, dict(recipe))
        if draw is not None:
            draw(stage / FIGURE)
        digests = {name: file_digest(stage / name) for name in (MODEL, MASKS)}
        write_json(stage / REPORT, {**report, "sha256": digests}, indent=2)
        if target.is_dir():
            _replace_run(target, stage)
        else:
            os.replace(stage, target)
        sync_folder(target)
        sync_folder(target.parent)
        note_written(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace_run(target: Path, stage: Path) -> None:
    """Replace the files of a run by those in `stage`; on error the old ones are moved back."""
    old = stage / "old"
    old.mkdir()
    moves: list[tuple[Path, Path]] = []
    # The report goes first and comes last: without it the folder is not taken for a whole run.
    for name in reversed(RUN_FILES):
        if (target / name).exists():
            moves.append((target / name, old / name))
    moves += [(stage / name, target / name) for name in RUN_FILES if (stage / name).exists()]
    done: list[tuple[Path, Path]] = []
    try:
        for start, end in moves:
            os.replace(start, end)
            done.append((start, end))
    except BaseException:
        for start, end in reversed(done):
            os.replace(end, start)
        raise


def _within(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise InvalidArgument(f"{folder} is not the folder of a run: {name} is missing")
    return path
