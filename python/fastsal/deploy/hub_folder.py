"""A folder for the Hugging Face hub: weights, timm's configuration, and a model card."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastsal.deploy.run_folder import MASKS, REPORT
from fastsal.deploy.runs import load_run
from fastsal.errors import FastsalError, FileFormatError, InvalidArgument
from fastsal.models.widths import widths_of
from fastsal.pruning.masks.masks import Masks
from fastsal.utils.atomic import error_number, note_written, temporary_beside
from fastsal.utils.json_files import read_json
from fastsal.utils.machine import versions
from fastsal.utils.paths import user_path
from fastsal.utils.plain_text import first_line

_NORMAL = 1.959964  # quantile of the normal distribution for an interval of 95 %
_RECIPE = ("criterion", "curvature", "block_size", "damping", "rounds", "compensate", "pattern")


def write_hub_folder(
    run: str | os.PathLike[str], folder: str | os.PathLike[str], *, spec: str | None = None
) -> Path:
    """Write the model of a run to a folder that `timm.create_model("local-dir:...")` reads.

    It has `model.safetensors`, `config.json` as timm writes it, and `README.md`, the model card:
    sparsity, recipe, accuracy with its interval, and the license of the original weights.

    Args:
        run: Folder of a run, of a model of timm at its original widths.
        folder: The folder, which must be new or empty; it appears whole or not at all.
        spec: As for `fastsal.load_run`.

    Returns:
        The folder.

    Raises:
        InvalidArgument: `folder` is not empty, or the model is not one of timm, or lacks units.
        FileFormatError: The run is damaged.
        FastsalError: timm cannot describe the model.
    """
    target, source = user_path(folder).absolute(), user_path(run)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidArgument(f"folder must be new or empty, got {target}")
    model = load_run(source, spec=spec)
    if not getattr(model, "pretrained_cfg", None):
        raise InvalidArgument(
            f"run must have a model of timm for the hub, got {type(model).__name__}"
        )
    if widths_of(model):
        raise InvalidArgument(
            "run must have a model with all of its units for the hub, as timm builds layers at "
            "their original widths; export it as packed, onnx or openvino"
        )
    masks = Masks.load(source / MASKS)
    report = read_json(source / REPORT, "run") if (source / REPORT).is_file() else {}
    if not isinstance(report, dict):
        raise FileFormatError(f"run: {source / REPORT} must be an object")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = temporary_beside(target)
    stage.mkdir()
    try:
        _write_model(model, stage)
        (stage / "README.md").write_text(_card(model, masks, report), encoding="utf-8")
        if target.is_dir():
            target.rmdir()
        os.replace(stage, target)
        note_written(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def _write_model(model: nn.Module, folder: Path) -> None:
    from timm.models import save_for_hf

    try:
        save_for_hf(model, str(folder), safe_serialization=True)
    except OSError:
        raise
    except Exception as error:  # whatever timm raises for a model that it cannot describe
        if (number := error_number(error)) is not None:
            raise OSError(number, os.strerror(number), str(folder.parent)) from error
        raise FastsalError(
            f"model: timm cannot describe {type(model).__name__} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    # safetensors makes files that only their owner can read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _card(model: nn.Module, masks: Masks, report: Mapping[str, Any]) -> str:
    """Return the text of the model card; it has no paths of this machine."""
    config: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}) or {})
    name = str(config.get("architecture") or type(model).__name__)
    task = "image-classification" if _classes(model) else "image-feature-extraction"
    # A file of weights may come from anywhere; timm knows about those that it downloads.
    arguments = report.get("arguments")
    is_timms = isinstance(arguments, dict) and arguments.get("weights") == "pretrained"
    license = config.get("license") if is_timms else None
    front = {
        "library_name": "timm",
        "pipeline_tag": task,
        "license": license or "other",
        "base_model": config.get("hf_hub_id") if is_timms else None,
    }
    parameters = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in front.items() if value),
        "tags:",
        *(f"- {tag}" for tag in ("timm", "pruning", "sparsity", "fastsal")),
        "---",
        f"# {name}, {100 * masks.sparsity:.1f} % of the weights pruned",
        "",
        f"Pruned by [fastsal](https://pypi.org/project/fastsal/) {versions()['fastsal']}. Pruned "
        "weights are zeros in dense tensors: the model has the size and the speed of the original.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {parameters:,} |",
        f"| parameters that are not zero | {nonzero:,} |",
        f"| sparsity of the {len(masks)} pruned tensors | {masks.sparsity:.4f} |",
        *_recipe_rows(masks.recipe),
        *_accuracy_rows(report.get("accuracy")),
        "",
    ]
    if not license:
        lines += ["The license is that of the original weights; state it before publishing.", ""]
    lines += [
        "```python",
        "import timm",
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf_hub:USER/NAME"',
        "```",
        "",
    ]
    return "\n".join(lines)


def _classes(model: nn.Module) -> int:
    classes = getattr(model, "num_classes", 0)
    return classes if isinstance(classes, int) else 0


def _recipe_rows(recipe: Mapping[str, Any]) -> list[str]:
    found = {key: _shown(recipe[key]) for key in _RECIPE if recipe.get(key) is not None}
    return [f"| {key} | {text} |" for key, text in found.items() if text]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_shown(each) for each in value if each is not None)
    return str(value).replace("|", "\\|")


def _accuracy_rows(found: object) -> list[str]:
    if not isinstance(found, dict):
        return []
    rows = []
    for key, title in (("before", "of the original"), ("after", "of this model")):
        entry = found.get(key)
        if isinstance(entry, dict) and entry.get("samples") and "accuracy" in entry:
            accuracy, samples = float(entry["accuracy"]), int(entry["samples"])
            low, high = wilson_interval(accuracy, samples)
            rows.append(
                f"| accuracy {title}, {samples:,} test images, 95 % interval | {accuracy:.4f} "
                f"({low:.4f} to {high:.4f}) |"
            )
    return rows


def wilson_interval(share: float, samples: int, z: float = _NORMAL) -> tuple[float, float]:
    """Return the interval of Wilson (1927) of a share of samples, 95 % by default."""
    scale = 1 + z**2 / samples
    center = (share + z**2 / (2 * samples)) / scale
    half = z * math.sqrt(share * (1 - share) / samples + z**2 / (4 * samples**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)
