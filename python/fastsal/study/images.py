"""Open the images of a study: disjoint splits of its tasks, and the images of its sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsal.data.class_map import ClassMap, is_keyword
from fastsal.data.content import content_of
from fastsal.data.corruptions import corrupt
from fastsal.data.image_set import ImageSet
from fastsal.data.imbalance import imbalanced
from fastsal.data.opening import open_images
from fastsal.errors import DataError, FileFormatError, InvalidArgument
from fastsal.study.folder_format import SPLITS_FILE
from fastsal.study.settings.schema import MOST_SAMPLES, SourceSettings, Study, TaskSettings
from fastsal.transfer.splits import SPLITS, Shares
from fastsal.transfer.tasks import Split, Task
from fastsal.utils.digests import Digest, file_digest
from fastsal.utils.json_files import read_json, write_json
from fastsal.utils.paths import user_path
from fastsal.utils.suggestions import listed


def open_tasks(study: Study, folder: Path | None = None) -> dict[str, Task]:
    """Open the images of the tasks of a study, divided into disjoint splits.

    Args:
        study: Settings of the study.
        folder: Results folder, from which the indices of splits are read that `store_splits` has
            written; None draws the splits.

    Returns:
        `{name: task}`, with all four splits.

    Raises:
        DataError: Images cannot be used, a class is missing in a split, a task would be tested on
            images that another task prunes, fits or trains with, or the stored indices belong to
            other images.
        FileFormatError: The file of indices is damaged.
    """
    stored = _read_splits(folder) if folder is not None else {}
    tasks: dict[str, Task] = {}
    for settings in study.tasks:
        images, test = _images(settings, study)
        if settings.name in stored:
            found = Task.from_indices(settings.name, images, stored[settings.name], test=test)
        else:
            cut = study.split
            shares = Shares(cut.prune, cut.fit, cut.tune, 0.0 if test is not None else cut.test)
            found = Task.cut(settings.name, images, test=test, shares=shares, seed=cut.seed)
        if settings.test_images is not None and isinstance(found.test, ImageSet):
            what = f"task {settings.name!r}: test_images"
            found = replace(found, test=few(found.test, settings.test_images, what))
        tasks[settings.name] = found
    check_test_images(list(tasks.values()))
    return tasks


def store_splits(tasks: Mapping[str, Task], folder: Path) -> None:
    """Write the indices of the splits to a results folder that has none."""
    if not _read_splits(folder):
        splits = {name: task.indices() for name, task in tasks.items()}
        write_json(folder / SPLITS_FILE, splits, indent=None)


def check_test_images(tasks: list[Task]) -> None:
    """Check that no task is tested on images that another task prunes, fits or trains with.

    Raises:
        DataError: Two tasks share such an image.
    """
    for task in tasks:
        for other in tasks:
            for split in ("prune", "fit", "tune"):
                used, test = getattr(other, split), task.test
                if not isinstance(used, ImageSet) or not isinstance(test, ImageSet):
                    continue
                if used.source != test.source:
                    continue
                shared = np.intersect1d(used.index, test.index)
                if len(shared):
                    raise DataError(
                        f"tasks: the test images of {task.name!r} must not be used by other tasks, "
                        f"but {len(shared)} are in split {split!r} of {other.name!r} (image "
                        f"{int(shared[0])} of {test.source})"
                    )


def few(images: ImageSet, most: int, name: str = "images") -> ImageSet:
    """Return at most `most` images: the first of every class, the same number of each.

    Args:
        images: The images.
        most: Their largest number.
        name: What gives this number, for the message.

    Raises:
        DataError: `most` is less than the number of classes.
    """
    if most >= len(images):
        return images
    each = most // len(images.classes)
    if each < 1:
        raise DataError(
            f"{name} must be at least {len(images.classes)}, one for each class of "
            f"{images.source}, got {most}"
        )
    chosen = [np.flatnonzero(images.y == k)[:each] for k in range(len(images.classes))]
    return images.subset(np.sort(np.concatenate(chosen)))


@dataclass(frozen=True)
class SourceImages:
    """The images of one task of a source.

    Attributes:
        task: Name of the task.
        weight: Weight of its statistics in the mixture.
        samples: Number of images for its statistics.
        prune: Images that these are drawn from.
        tune: Images for fine-tuning.
    """

    task: str
    weight: float
    samples: int
    prune: ImageSet
    tune: ImageSet


def source_images(
    source: SourceSettings, tasks: Mapping[str, Task], seed: int
) -> list[SourceImages]:
    """Return the images of a source, with its corruption and imbalance applied.

    Args:
        source: Settings of the source.
        tasks: `{name: task}`.
        seed: Seed of corruption and imbalance.

    The samples are shared out evenly over its tasks; the weights count in the statistics.

    Raises:
        DataError: A task has fewer images than the source needs.
        InvalidArgument: The source has fewer samples than tasks.
    """
    wanted = (source.samples or MOST_SAMPLES) // len(source.tasks)
    if wanted < 1:
        raise InvalidArgument(
            f"samples of source {source.name!r} must be at least its {len(source.tasks)} tasks, "
            f"got {source.samples}"
        )
    found = []
    for name, weight in source.tasks.items():
        prune, tune = (
            _transformed(getattr(tasks[name], part), source, seed) for part in ("prune", "tune")
        )
        each = wanted if source.samples else min(wanted, len(prune))
        if len(prune) < each:
            raise DataError(
                f"samples of source {source.name!r} must be at most the {len(prune)} images in "
                f"split 'prune' of {name!r}, got {each}; use fewer samples or a larger share in "
                "[split]"
            )
        found.append(SourceImages(name, weight, each, prune, tune))
    return found


def images_of(split: Split | None) -> ImageSet:
    """Return a split of a task of a study, which is always an `ImageSet`."""
    assert isinstance(split, ImageSet)
    return split


def class_map_of(settings: TaskSettings, study: Study) -> ClassMap | None:
    """Return the class map of a task, with the path of a file resolved."""
    given = settings.class_map
    if not isinstance(given, str) or is_keyword(given):
        return given
    return study.root / user_path(given)


def class_map_digests(study: Study) -> dict[str, str]:
    """Return `{class map of task: digest}` of the files of class maps."""
    found = {}
    for settings in study.tasks:
        path = class_map_of(settings, study)
        if isinstance(path, Path) and path.is_file():
            found[f"class map of {settings.name}"] = file_digest(path)[:16]
    return found


def digests_of(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Return `{task: digest}` of the content of images and labels."""
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
            f"task {settings.name!r}: test and data must have the same classes, got "
            f"{listed(test.classes)} and {listed(images.classes)}"
        )
    if settings.images is not None:
        images = few(images, settings.images, f"task {settings.name!r}: images")
    return images, test


def _transformed(images: Any, source: SourceSettings, seed: int) -> ImageSet:
    found: ImageSet = images
    if source.imbalance < 1:
        found = imbalanced(found, source.imbalance, seed=seed)
    if source.corruption is not None:
        found = corrupt(found, source.corruption, severity=source.severity, seed=seed)
    return found


def _read_splits(folder: Path) -> dict[str, dict[str, list[int]]]:
    path = folder / SPLITS_FILE
    try:
        found: dict[str, dict[str, list[int]]] = read_json(path, "out")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if not isinstance(found, dict):
        raise FileFormatError(f"out: {path} is damaged (it must have an object)")
    return found


def _digest(task: Task) -> str:
    digest = Digest()
    for split in SPLITS:
        images = images_of(getattr(task, split))
        # Files had other pixels before they were preprocessed by timm.
        how = " timm" if isinstance(images.x, tuple) else ""
        digest.text(f"{split} {content_of(images)}{how}")
    return digest.hexdigest()[:16]
