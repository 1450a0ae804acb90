"""What a study needs, told without running it: cells, files, images, time and memory.

Nothing is downloaded or written. Where images are missing, their number is that of ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastsal.data.image_set import ImageSet
from fastsal.data.opening import file_of
from fastsal.errors import FastsalError
from fastsal.study.backbones import model_path, weights_path
from fastsal.study.cells import Cell, cells_of
from fastsal.study.folder_format import SPLITS_FILE
from fastsal.study.images import open_tasks
from fastsal.study.settings.schema import MOST_SAMPLES, ModelSettings, Study, TaskSettings
from fastsal.transfer.splits import SPLITS
from fastsal.transfer.tasks import Task
from fastsal.utils.plain_text import plain_line

# Images a class of ImageNet, assumed for folders that are missing.
_DATA_IMAGES, _TEST_IMAGES = 1300, 50
_SHOWN = 3  # names in a line

Counts = Mapping[str, int]  # split to its number of images


@dataclass(frozen=True)
class Needs:
    """What a study needs.

    Attributes:
        cells: All cells.
        done: Cells with a result in the results folder.
        images: `{task: {split: number of images}}`; None for a task whose number is not known.
        is_assumed: Whether numbers of images are those of ImageNet, as folders are missing.
        missing: One line for each folder or file that is missing.
        downloads: One line for each model whose weights timm downloads first.
    """

    cells: list[Cell]
    done: list[Cell]
    images: dict[str, Counts | None]
    is_assumed: bool
    missing: list[str] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[Cell]:
        """Cells without a result."""
        done = {cell.key for cell in self.done}
        return [cell for cell in self.cells if cell.key not in done]


def needs_of(study: Study, out: Path) -> tuple[Needs, dict[str, Task] | None]:
    """Return what a study needs, and its tasks if their images are there.

    Args:
        study: Settings of the study.
        out: Results folder; it need not exist.
    """
    cells = cells_of(study)
    # The digest of a key has the content of all images, which would take long to read.
    there = {_described(path.stem) for path in (out / "cells").glob("[!.]*.json")}
    absent = missing_data(study)
    missing = absent + missing_weights(study)
    tasks: dict[str, Task] | None = None
    if not absent:
        try:
            tasks = open_tasks(study, out if (out / SPLITS_FILE).is_file() else None)
        except (FastsalError, OSError) as error:
            missing.append(plain_line(error, None))
    images: dict[str, Counts | None] = {}
    for settings in study.tasks:
        if tasks is not None:
            task = tasks[settings.name]
            images[settings.name] = {s: _size(getattr(task, s)) for s in SPLITS}
        else:
            images[settings.name] = _assumed(settings, study)
    found = Needs(
        cells=cells,
        done=[cell for cell in cells if _described(cell.key) in there],
        images=images,
        is_assumed=tasks is None,
        missing=missing,
        downloads=_downloads(study),
    )
    return found, tasks


def missing_data(study: Study) -> list[str]:
    """Return a line for each folder or file of images that does not exist."""
    found: dict[Path, list[str]] = {}
    for settings in study.tasks:
        for spec in (settings.data, settings.test):
            path = None if spec is None else file_of(spec, study.root)
            if path is not None and not path.exists():
                found.setdefault(path, []).append(settings.name)
    return [f"data {path} does not exist (tasks {_few(names)})" for path, names in found.items()]


def missing_weights(study: Study) -> list[str]:
    """Return a line for each file of a model or of its weights that does not exist."""
    found: list[str] = []
    for settings in study.models:
        file = model_path(study, settings).rpartition(":")[0]
        if file.endswith(".py") and not Path(file).is_file():
            found.append(f"model file {file} does not exist (model {settings.name})")
        weights = weights_path(study, settings)
        if weights not in (None, "pretrained") and not Path(str(weights)).is_file():
            found.append(f"weights {weights} do not exist (model {settings.name})")
    return found


def source_samples(cell: Cell, images: Mapping[str, Counts | None]) -> int:
    """Return the number of images for the statistics of a cell."""
    if cell.source.samples:
        return cell.source.samples
    counts = [images[name] for name in cell.source.tasks]
    return min(MOST_SAMPLES, sum(c["prune"] if c else MOST_SAMPLES for c in counts))


def tuning_images(cell: Cell, study: Study, images: Mapping[str, Counts | None]) -> int:
    """Return the number of images of one epoch of fine-tuning of a cell."""
    if study.finetune is None:
        return 0
    count = sum(c["tune"] if (c := images[name]) else 0 for name in cell.source.tasks)
    return min(count, study.finetune.images or count)


def _assumed(settings: TaskSettings, study: Study) -> Counts | None:
    if settings.classes is None:
        return None
    classes = len(settings.classes)
    whole = classes * _DATA_IMAGES
    count = min(whole, settings.images or whole)
    split = study.split
    held = round(split.test * count) if settings.test is None else 0
    test = classes * _TEST_IMAGES if settings.test is not None else held
    rest = count - held
    found = {s: round(getattr(split, s) * rest) for s in ("prune", "fit", "tune")}
    return {**found, "test": min(test, settings.test_images or test)}


def _downloads(study: Study) -> list[str]:
    """Return a line for each model whose pretrained weights are not in the cache."""
    found = []
    for settings in study.models:
        if settings.weights == "pretrained" and not _is_cached(settings):
            found.append(
                f"weights of {settings.model} are not in the cache of timm, which downloads them "
                f"at first (model {settings.name})"
            )
    return found


def _is_cached(settings: ModelSettings) -> bool:
    import timm
    from huggingface_hub import try_to_load_from_cache

    try:
        config = timm.get_pretrained_cfg(settings.model)
    except RuntimeError:  # no such tag: told when the model is built
        return True
    name = getattr(config, "hf_hub_id", None)
    if not name:
        return False
    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def _described(key: str) -> str:
    """Return the description of a cell in its key."""
    return key.rpartition("-")[0]


def _size(split: object) -> int:
    return len(split) if isinstance(split, ImageSet) else 0


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
