"""Read and validate the results folder of a study."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.study.folder_format import (
    DENSE_PRUNED,
    DONE,
    FAILED,
    FORMAT,
    PRUNED_TUNED,
    SOURCE,
    STUDY_FILE,
    TRANSFER,
)
from fastsal.study.report.csv_rows import column, read_records, read_rows
from fastsal.utils.json_files import read_json
from fastsal.utils.paths import user_path

Key = TypeVar("Key")


@dataclass(frozen=True)
class Row:
    """Result of one cell on one task; accuracies are top-1, 0 to 1; None is an empty field."""

    cell: str
    model: str
    source: str
    criterion: str
    rounds: int
    sparsity: float = column(fraction=True)
    seed: int = column()
    task: str = column()
    role: str = column(choices=(SOURCE, TRANSFER))
    dense: float = column(fraction=True)
    pruned: float = column(fraction=True)
    tuned: float | None = column(fraction=True)
    head: str | None = column(optional=True)
    samples: int | None = column(optional=True)
    damping: float | None = column(optional=True)
    sparsity_reached: float | None = column(fraction=True, optional=True)
    predicted_increase: float | None = column(optional=True)
    measured_increase: float | None = column(optional=True)
    classes: int | None = column(optional=True)
    test_images: int | None = column(optional=True)
    seconds_statistics: float | None = column(optional=True)
    seconds_prune: float | None = column(optional=True)
    seconds_evaluate: float | None = column(optional=True)
    seconds_finetune: float | None = column(optional=True)
    peak_memory_bytes: int | None = column(optional=True)
    statistics_bytes: int | None = column(optional=True)


@dataclass(frozen=True)
class Failure:
    """A failed cell with its error in one line."""

    cell: str
    model: str
    source: str
    criterion: str
    rounds: int
    sparsity: float
    seed: int
    error: str | None


@dataclass(frozen=True)
class Layer:
    """Number of pruned weights of a layer in a cell; `position` is its index in the network."""

    model: str
    source: str
    criterion: str
    rounds: int
    sparsity: float = column(fraction=True)
    seed: int = column()
    position: int = column()
    layer: str = column()
    weights: int = column()
    pruned: int = column()


@dataclass(frozen=True)
class LossLine:
    """Loss (nats) and accuracy at position `t`, 0 to 1, on the line between two states."""

    model: str
    source: str
    criterion: str
    rounds: int
    sparsity: float = column(fraction=True)
    seed: int = column()
    task: str = column()
    role: str = column(choices=(SOURCE, TRANSFER))
    path: str = column(choices=(DENSE_PRUNED, PRUNED_TUNED))
    t: float = column(fraction=True)
    loss: float | None = column()
    accuracy: float | None = column()


@dataclass(frozen=True)
class Overlap:
    """Overlap of the Fisher statistics of the source and of a task in one layer, 0 to 1."""

    model: str
    source: str
    seed: int
    task: str
    layer: str
    position: int
    diagonal: float | None
    eigenspace: float | None


@dataclass(frozen=True)
class Variant:
    """A criterion with a number of rounds; `index` is its position and color on the page."""

    criterion: str
    rounds: int
    label: str
    index: int


@dataclass(frozen=True, repr=False)
class Results:
    """Content of the results folder of a study.

    Attributes:
        folder: Path of the folder.
        name: Name of the study.
        facts: Content of `study.json`.
        rows: Rows of finished cells.
        failures: Failed cells.
        layers: Pruned weights per layer.
        loss_lines: Losses along lines; empty if not measured.
        overlaps: Fisher overlaps; empty if not measured.
        variants: `{(criterion, rounds): variant}`, in the order of the study.
    """

    folder: Path
    name: str
    facts: dict[str, Any]
    rows: list[Row]
    failures: list[Failure]
    layers: list[Layer] = field(default_factory=list)
    loss_lines: list[LossLine] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    variants: dict[tuple[str, int], Variant] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Results({self.name!r}, {len(self.rows)} rows, {len(self.failures)} failures, "
            f"{len(self.variants)} variants)"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the study; empty if the folder does not have them."""
        found = self.facts.get("settings") or self.facts.get("identity")
        return found if isinstance(found, dict) else {}

    def prunable(self, model: str) -> int | None:
        """Return the number of prunable weights of a model; None if the folder does not have it."""
        try:
            return int(self.facts["models"][model]["prunable"])
        except (KeyError, TypeError, ValueError):
            return None


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Read the results of `fastsal sweep` or `fastsal transfer`.

    Args:
        folder: Results folder.

    Raises:
        InvalidArgument: The folder is not a results folder; the message names what is missing.
        FileFormatError: A file is damaged or has another format; the message names file, line and
            column.
    """
    folder = user_path(folder)
    _check_kind(folder)
    facts = _read_facts(folder / STUDY_FILE)
    path = folder / "results.csv"
    rows = read_rows(path, Row, skip=_failed)
    failures = read_rows(path, Failure, skip=lambda record: not _failed(record))
    statuses = read_records(path, ["study", "status"])
    for line, record in statuses:
        if record["status"] not in (DONE, FAILED):
            raise FileFormatError(
                f"{path}, line {line}: status must be {DONE} or {FAILED}, got {record['status']!r}"
            )
    if not statuses:
        raise FileFormatError(f"{path}: no rows; the study has no finished cell")
    _check_once(path, rows)
    return Results(
        folder=folder,
        name=str(facts.get("name") or statuses[0][1]["study"]),
        facts=facts,
        rows=rows,
        failures=failures,
        layers=_optional(folder / "layers.csv", Layer),
        loss_lines=_optional(folder / "loss_line.csv", LossLine),
        overlaps=_optional(folder / "overlap.csv", Overlap),
        variants=_variants(facts, [*rows, *failures]),
    )


def in_order(found: Iterable[Key]) -> list[Key]:
    """Return each value once, in the order of its first appearance."""
    return list(dict.fromkeys(found))


def _failed(record: dict[str, str]) -> bool:
    return record.get("status") == FAILED


def _check_kind(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InvalidArgument(f"dir must be the results folder of a study; {folder} {what}")
    missing = [n for n in (STUDY_FILE, "results.csv") if not (folder / n).is_file()]
    if not missing:
        return
    message = f"dir must be the results folder of a study; {folder} has no {missing[0]}"
    if (folder / "masks.safetensors").is_file():
        message += (
            ". It is the output of `fastsal prune`, with results in report.json; "
            "`fastsal transfer` and `fastsal sweep` write results folders"
        )
    elif missing == ["results.csv"]:
        message += ". The study has not finished; rerun its command to resume it"
    raise InvalidArgument(message)


def _read_facts(path: Path) -> dict[str, Any]:
    facts = read_json(path)
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != FORMAT:
        raise FileFormatError(f"{path}: format must be {FORMAT}, got {found!r}")
    result: dict[str, Any] = facts
    return result


def _optional(path: Path, kind: type[Key]) -> list[Key]:
    return read_rows(path, kind) if path.is_file() else []


def _check_once(path: Path, rows: list[Row]) -> None:
    """Check for duplicate rows, which would count twice in every mean."""
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        point = (row.model, row.source, row.criterion, row.rounds, row.sparsity, row.seed, row.task)
        if point in seen:
            raise FileFormatError(f"{path}: task {row.task!r} is duplicated in cell {row.cell!r}")
        seen.add(point)


def _variants(facts: dict[str, Any], rows: list[Any]) -> dict[tuple[str, int], Variant]:
    """Order variants as the study lists its criteria; labels name rounds where they differ."""
    found = in_order((row.criterion, row.rounds) for row in rows)
    settings = facts.get("settings")
    listed = settings.get("criteria", []) if isinstance(settings, dict) else []
    names = [c.get("name") if isinstance(c, dict) else c for c in listed]
    place = {name: i for i, name in enumerate(names)}
    found.sort(key=lambda key: (place.get(key[0], len(place)), key[0] if place else "", key[1]))
    several = {c for c in {k[0] for k in found} if sum(k[0] == c for k in found) > 1}
    variants = {}
    for i, (criterion, rounds) in enumerate(found):
        label = criterion
        if criterion in several:
            label += f", {rounds} round{'s' if rounds > 1 else ''}"
        variants[criterion, rounds] = Variant(criterion, rounds, label, i)
    return variants
