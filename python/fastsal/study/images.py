"""The images of a study: its tasks, cut once and for all, and what its sources make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsal.data.corruptions import corrupt
from fastsal.data.image_set import ImageSet
from fastsal.data.imbalance import imbalanced
from fastsal.data.opening import open_images
from fastsal.errors import DataError, FileFormatError, InvalidArgument
from fastsal.study.settings.schema import MOST_SAMPLES, SourceSettings, Study, TaskSettings
from fastsal.transfer.splits import Shares
from fastsal.transfer.tasks import Task
from fastsal.utils.atomic import write_text

SPLITS = "splits.json"


def open_tasks(study: Study, folder: Path | None = None) -> dict[str, Task]:
    """Open the images of a study's tasks, each in parts that share none.

    Args:
        study: its settings.
        folder: of the results, where the cut is kept as indices and read again; None cuts anew.

    Returns:
        `{name: task}`, with all four parts.

    Raises:
        DataError: images that cannot be used, a class that is missing in a part, or two tasks of
            which one would be tested on what the other prunes, fits or trains with.
        FileFormatError: the indices that are kept are of other images.
    """
    kept = _read_splits(folder) if folder is not None else {}
    tasks: dict[str, Task] = {}
    for settings in study.tasks:
        images, test = _images(settings, study)
        if settings.name in kept:
            found = Task.from_indices(settings.name, images, kept[settings.name], test=test)
        else:
            cut = study.split
            shares = Shares(cut.prune, cut.fit, cut.tune, 0.0 if test is not None else cut.test)
            found = Task.cut(settings.name, images, test=test, shares=shares, seed=cut.seed)
        if settings.test_images is not None and isinstance(found.test, ImageSet):
            found = replace(found, test=few(found.test, settings.test_images))
        tasks[settings.name] = found
    check_apart(list(tasks.values()))
    if folder is not None and not kept:
        splits = {name: task.indices() for name, task in tasks.items()}
        write_text(folder / SPLITS, json.dumps(splits) + "\n")
    return tasks


def check_apart(tasks: list[Task]) -> None:
    """Check that no task is tested on images that any other prunes, fits or trains with.

    Raises:
        DataError: names the tasks and an image.
    """
    for task in tasks:
        for other in tasks:
            for part in ("prune", "fit", "tune"):
                used, test = getattr(other, part), task.test
                if not isinstance(used, ImageSet) or not isinstance(test, ImageSet):
                    continue
                if used.source != test.source:
                    continue
                shared = np.intersect1d(used.index, test.index)
                if len(shared):
                    raise DataError(
                        f"tasks: {task.name!r} is tested on {len(shared)} images that are in "
                        f"part {part!r} of {other.name!r} (image {int(shared[0])} of "
                        f"{test.source}); takes tasks whose test images nobody else uses"
                    )


def few(images: ImageSet, most: int) -> ImageSet:
    """Keep at most `most` images: the first of every class, as many of each.

    Raises:
        DataError: fewer than one a class would be left.
    """
    if most >= len(images):
        return images
    each = most // len(images.classes)
    if each < 1:
        raise DataError(
            f"images: {most} of {images.source} are fewer than its {len(images.classes)} classes"
        )
    chosen = [np.flatnonzero(images.y == k)[:each] for k in range(len(images.classes))]
    return images.subset(np.sort(np.concatenate(chosen)))


@dataclass(frozen=True)
class SourcePart:
    """What a source takes of one task.

    Attributes:
        task: the task's name.
        weight: of its statistics.
        samples: images of its statistics.
        prune: images that they are drawn from.
        tune: images for fine-tuning.
    """

    task: str
    weight: float
    samples: int
    prune: ImageSet
    tune: ImageSet


def parts_of(source: SourceSettings, tasks: Mapping[str, Task], seed: int) -> list[SourcePart]:
    """Give a source's images, as corrupted, rare or mixed as it has them.

    The samples are shared out evenly over its tasks; the weights count in the statistics.

    Raises:
        DataError: a task has fewer images than the source takes.
    """
    wanted = (source.samples or MOST_SAMPLES) // len(source.tasks)
    if wanted < 1:
        raise InvalidArgument(
            f"samples: {source.samples} of source {source.name!r} are fewer than its tasks"
        )
    found = []
    for name, weight in source.tasks.items():
        prune, tune = (_spoiled(getattr(tasks[name], part), source, seed) for part in PARTS)
        each = wanted if source.samples else min(wanted, len(prune))
        if len(prune) < each:
            raise DataError(
                f"samples: source {source.name!r} takes {each} images of {name!r}, whose part "
                f"'prune' holds {len(prune)}; takes fewer samples, or a larger share in [split]"
            )
        found.append(SourcePart(name, weight, each, prune, tune))
    return found


PARTS = ("prune", "tune")


def images_of(part: Any) -> ImageSet:
    """A part of a study's task, which is always an `ImageSet`."""
    assert isinstance(part, ImageSet)
    return part


def digests_of(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Return a digest of what every task holds: labels, places, and pixels or names of files."""
    return {name: _digest(task) for name, task in tasks.items()}


def _images(settings: TaskSettings, study: Study) -> tuple[ImageSet, ImageSet | None]:
    def opened(spec: str) -> ImageSet:
        try:
            return open_images(spec, classes=settings.classes, root=study.root)
        except InvalidArgument as error:
            raise type(error)(f"task {settings.name!r}: {error}") from None

    images = opened(settings.data)
    test = None if settings.test is None else opened(settings.test)
    if test is not None and test.classes != images.classes:
        raise DataError(
            f"task {settings.name!r}: test has classes {list(test.classes)[:5]} and data "
            f"{list(images.classes)[:5]}"
        )
    return (images if settings.images is None else few(images, settings.images)), test


def _spoiled(images: Any, source: SourceSettings, seed: int) -> ImageSet:
    found: ImageSet = images
    if source.imbalance < 1:
        found = imbalanced(found, source.imbalance, seed=seed)
    if source.corruption is not None:
        found = corrupt(found, source.corruption, severity=source.severity, seed=seed)
    return found


def _read_splits(folder: Path) -> dict[str, dict[str, list[int]]]:
    path = folder / SPLITS
    try:
        found: dict[str, dict[str, list[int]]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FileFormatError(f"out: {path} is damaged ({error})") from None
    return found


def _digest(task: Task) -> str:
    digest = hashlib.sha256()
    for part in ("prune", "fit", "tune", "test"):
        images: ImageSet = getattr(task, part)
        digest.update(f"{part} {images.classes}".encode())
        digest.update(np.ascontiguousarray(images.y).tobytes())
        if isinstance(images.x, tuple):
            for path in images.x:
                digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}".encode())
        else:
            digest.update(np.ascontiguousarray(images.x).tobytes())
    return digest.hexdigest()[:16]
