"""The folder of a run: `model.safetensors`, `masks.safetensors`, `report.json`, and a figure."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.utils.atomic import check_writable, note_written, sync_folder, temporary_beside
from fastsal.utils.devices import device_facts, resolve_device
from fastsal.utils.digests import file_digest
from fastsal.utils.json_files import read_json, write_json
from fastsal.utils.machine import peak_memory, versions

if TYPE_CHECKING:
    from torch import nn

    from fastsal.models.left_out import LeftOut
    from fastsal.pruning.masks.in_use import InUse
    from fastsal.pruning.masks.masks import Masks

MODEL, MASKS, REPORT = "model.safetensors", "masks.safetensors", "report.json"
FIGURE = "safety.svg"
RUN_FILES = (MODEL, MASKS, FIGURE, REPORT)
_REPORT_BYTES = 2**20


def weights_file(path: Path) -> Path:
    """Return `path`, or the file of weights in it if it is the folder of a run."""
    return _within(path, MODEL) if path.is_dir() else path


def masks_file(path: Path) -> Path:
    """Return `path`, or the file of masks in it if it is the folder of a run."""
    return _within(path, MASKS) if path.is_dir() else path


def check_target(folder: Path, force: bool) -> None:
    """Check before the work that a run can be written to `folder`.

    Raises:
        InvalidArgument: `folder` is a file, cannot be written, or is not empty and `force` is not
            given.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument(f"out must be a folder, got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise InvalidArgument(f"out: {folder} is not empty; give --force to overwrite its run")
    check_writable(folder, "out")


def check_model(path: Path, model: nn.Module) -> None:
    """Check before the work that a model can be saved to `path`, a folder or a file.

    Raises:
        InvalidArgument: The model has state that a file cannot have, or the disk is too small.
    """
    from fastsal.models.saving import check_savable

    # Masks have a bit for each weight; reports and headers are small.
    check_writable(path, "out", check_savable(model) * 33 // 32 + _REPORT_BYTES)


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


def run_facts(given: Mapping[str, Any], masks: Masks) -> dict[str, Any]:
    """Return the fields common to all reports: command, versions, device and kept weights."""
    peak = peak_memory()
    kept, shapes = masks.kept, masks.shapes
    return {
        "command": ["fastsal", *sys.argv[1:]],
        "arguments": {k: v for k, v in given.items() if k not in ("as_json", "quiet", "force")},
        "versions": {**versions(), "platform": platform.platform()},
        "device": device_facts(resolve_device(given["device"])),
        "sparsity": masks.sparsity,
        "parameters": {name: {"shape": list(shapes[name]), "kept": kept[name]} for name in masks},
        "peak_memory_mib": round(peak / 2**20) if peak else None,
    }


def selection_facts(left_out: LeftOut | None, in_use: InUse | None) -> dict[str, Any]:
    """Return the fields of a report about parameters left out and zeros of the weights in use."""
    return {
        "left_out": left_out.as_dict() if left_out else None,
        "in_use": in_use.as_dict() if in_use else None,
    }


def recorded_in_use(folder: Path) -> dict[str, Any] | None:
    """Return what the report of a run says about the weights in use; None if it says nothing."""
    path = folder / REPORT
    found = read_json(path, "report").get("in_use") if path.is_file() else None
    return found if isinstance(found, dict) else None


def recorded_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file according to the report of a run; empty without a report.

    Raises:
        FileFormatError: the report is not a JSON object.
    """
    path = folder / REPORT
    if not path.is_file():
        return {}
    report = read_json(path, "report")
    try:
        digests = report.get("sha256", {})
        found = {str(name): str(digest) for name, digest in digests.items()}
    except AttributeError as error:
        raise FileFormatError(f"report: {path} is not the report of a run ({error})") from None
    for name in found:
        if name not in (MODEL, MASKS):
            raise FileFormatError(f"report: {path} has the digest of another file, {name!r}")
    return found


def _within(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise InvalidArgument(f"{folder} is not the folder of a run: {name} is missing")
    return path
