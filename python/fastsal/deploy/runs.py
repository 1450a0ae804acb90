"""Save the folder of a run, and build its model again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsal.deploy.run_folder import REPORT, weights_file, write_run
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.loading import load_model
from fastsal.models.saving import check_savable
from fastsal.pruning.masks.masks import Masks
from fastsal.utils.json_files import read_json
from fastsal.utils.numbers import as_integer
from fastsal.utils.paths import user_path


def save_run(
    folder: str | os.PathLike[str],
    model: nn.Module,
    masks: Masks,
    spec: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    report: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the folder of a run, as `fastsal prune` does: weights, masks and a report.

    `load_run` and the commands read it, also if units were removed from the model.

    Args:
        folder: The folder; its files appear together or not at all.
        model: The pruned model, or a wrapper of it.
        masks: Its masks, `result.masks` of `prune` or of `prune_structure`.
        spec: How the original model is built: a timm name or `path/file.py:function`, as for
            `fastsal.load_model`.
        num_classes: As for `fastsal.load_model`.
        in_chans: As for `fastsal.load_model`.
        report: Further fields of the report, as values that JSON can hold.
        overwrite: Whether the run in a folder that is not empty is replaced.

    Raises:
        InvalidArgument: `folder` is a file or not empty, or the model has state that a file cannot
            have.
        MaskError: The masks do not fit the model.
    """
    target = user_path(folder)
    if target.exists() and not target.is_dir():
        raise InvalidArgument(f"folder must be a folder, got the file {target}")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InvalidArgument(f"folder must be empty, or overwrite be True, got {target}")
    if not isinstance(spec, str) or not spec:
        raise InvalidArgument(
            f"spec must be a timm name or path/file.py:function, got {spec!r:.80}"
        )
    check_savable(model)
    masks.check(model)
    arguments = {"model": spec, "num_classes": num_classes, "in_chans": in_chans}
    facts = {"arguments": arguments, "sparsity": masks.sparsity, **(report or {})}
    write_run(target, model, masks, {"model": spec}, facts)


def load_run(
    folder: str | os.PathLike[str],
    *,
    spec: str | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build the model of a run and load its weights.

    Units that were removed from it are not there: layers have the widths that the run recorded.

    Args:
        folder: Folder that `fastsal prune`, `fastsal finetune` or `save_run` wrote.
        spec: How the original model is built, as for `fastsal.load_model`; None takes what the
            report says. Paths are relative to the current folder.
        device: As for `fastsal.load_model`.

    Returns:
        The model, in evaluation mode.

    Raises:
        InvalidArgument: `folder` is not that of a run, or the file of the model is not where it
            was.
        FileFormatError: The report or the weights are damaged, or do not fit the model.
    """
    path, found, arguments = _described(folder, spec)
    return _built(found, arguments, device, weights_file(path))


def original_of(
    folder: str | os.PathLike[str],
    *,
    spec: str | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build the model that a run began with, at its original size and with random weights.

    Args:
        folder: As for `load_run`.
        spec: As for `load_run`.
        device: As for `load_run`.

    Raises:
        InvalidArgument: As for `load_run`.
        FileFormatError: The report does not say how the model is built.
    """
    _, found, arguments = _described(folder, spec)
    return _built(found, arguments, device, None)


def _built(
    spec: str, arguments: Mapping[str, Any], device: str | torch.device, weights: Path | None
) -> nn.Module:
    return load_model(
        spec,
        weights=weights,
        num_classes=as_integer(arguments.get("num_classes")),
        in_chans=as_integer(arguments.get("in_chans")),
        device=device,
    )


def _described(
    folder: str | os.PathLike[str], spec: str | None
) -> tuple[Path, str, dict[str, Any]]:
    """Return the folder of a run, how its model is built, and the arguments in its report."""
    path = user_path(folder)
    if not path.is_dir():
        what = "which is a file" if path.exists() else "which does not exist"
        raise InvalidArgument(f"folder must be the folder of a run, got {path}, {what}")
    weights_file(path)  # an error of its own if it is missing
    report = read_json(path / REPORT, "folder") if (path / REPORT).is_file() else {}
    arguments = report.get("arguments") if isinstance(report, dict) else None
    arguments = arguments if isinstance(arguments, dict) else {}
    found = arguments.get("model") if spec is None else spec
    if not isinstance(found, str):
        raise FileFormatError(
            f"folder: {path / REPORT} does not say how the model is built; pass spec"
        )
    file = found.rpartition(":")[0]
    if spec is None and file.endswith(".py") and not user_path(file).is_file():
        raise InvalidArgument(
            f"folder: the model of {path} is {found!r}, and there is no file {file}; pass spec, or "
            "run from the folder that the path is relative to"
        )
    return path, found, arguments
