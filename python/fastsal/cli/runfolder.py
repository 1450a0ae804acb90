"""The folder of a run as the command line checks it before its work, and reads its report."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsal.deploy.run_folder import MASKS, MODEL, REPORT, masks_file, weights_file, write_run
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.utils.atomic import check_writable
from fastsal.utils.devices import device_facts, resolve_device
from fastsal.utils.json_files import read_json
from fastsal.utils.machine import peak_memory, versions

if TYPE_CHECKING:
    from torch import nn

    from fastsal.models.left_out import LeftOut
    from fastsal.pruning.masks.in_use import InUse
    from fastsal.pruning.masks.masks import Masks

__all__ = [
    "REPORT", "check_model", "check_target", "masks_file", "recorded_digests", "recorded_in_use",
    "run_facts", "selection_facts", "weights_file", "write_run",
]  # fmt: skip

_REPORT_BYTES = 2**20


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


def recorded_size(folder: Path) -> tuple[int, int] | None:
    """Return the height and width of the images that a run was pruned with; None if unknown."""
    path = folder / REPORT
    found = read_json(path, "report").get("image_size") if path.is_file() else None
    if not isinstance(found, list) or len(found) != 2:
        return None
    height, width = found
    return int(height), int(width)


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
