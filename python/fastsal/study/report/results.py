"""The folder of a study's results, read into typed rows and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.study.report.tables import column, read_records, read_rows

FORMAT = 1
SOURCE, TRANSFER = "source", "transfer"
DENSE_PRUNED, PRUNED_TUNED = "dense-pruned", "pruned-tuned"

Key = TypeVar("Key")


@dataclass(frozen=True)
class Row:
    """One cell and task; accuracies are top-1, 0 to 1. `None` is an empty field."""

    cell: str
    model: str
    source: str
    criterion: str
    rounds: int
    sparsity: float = column(share=True)
    seed: int = column()
    task: str = column()
    role: str = column(choices=(SOURCE, TRANSFER))
    dense: float = column(share=True)
    pruned: float = column(share=True)
    tuned: float | None = column(share=True)
    head: str | None = column(optional=True)
    samples: int | None = column(optional=True)
    damping: float | None = column(optional=True)
    sparsity_reached: float | None = column(share=True, optional=True)
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
    """A cell that failed, and why in one line."""

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
    """How many weights of a layer went in a cell; `position` is its order in the network."""

    model: str
    source: str
    criterion: str
    rounds: int
    sparsity: float = column(share=True)
    seed: int = column()
    position: int = column()
    layer: str = column()
    weights: int = column()
    pruned: int = column()


@dataclass(frozen=True)
class Landscape:
    """Loss (nats) and accuracy of a task at `t`, 0 to 1, of the line between two models."""

    model: str
    source: str
    criterion: str
    rounds: int
    sparsity: float = column(share=True)
    seed: int = column()
    task: str = column()
    role: str = column(choices=(SOURCE, TRANSFER))
    path: str = column(choices=(DENSE_PRUNED, PRUNED_TUNED))
    t: float = column(share=True)
    loss: float | None = column()
    accuracy: float | None = column()


@dataclass(frozen=True)
class Overlap:
    """Overlap of the Fishers of the source and of a task in one layer, 0 to 1."""

    model: str
    source: str
    seed: int
    task: str
    layer: str
    position: int
    diagonal: float | None
    eigenspace: float | None


@dataclass(frozen=True)
class Method:
    """A criterion in so many rounds; `index` is its place and colour on the page."""

    criterion: str
    rounds: int
    label: str
    index: int


@dataclass(frozen=True)
class Results:
    """What a study's folder holds.

    Attributes:
        folder: where it is.
        name: of the study.
        facts: `study.json`.
        rows: of cells that are done.
        failures: cells that are not.
        layers: where the zeros went.
        landscape: losses along lines; empty where they were not asked for.
        overlap: of Fishers; empty where they were not asked for.
        methods: `{(criterion, rounds): method}`, in the order of the study.
    """

    folder: Path
    name: str
    facts: dict[str, Any]
    rows: list[Row]
    failures: list[Failure]
    layers: list[Layer] = field(default_factory=list)
    landscape: list[Landscape] = field(default_factory=list)
    overlap: list[Overlap] = field(default_factory=list)
    methods: dict[tuple[str, int], Method] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The study as it was asked for; empty where the folder does not say."""
        found = self.facts.get("settings") or self.facts.get("identity")
        return found if isinstance(found, dict) else {}

    def prunable(self, model: str) -> int | None:
        """Return the number of prunable weights of a model, where the folder says it."""
        try:
            return int(self.facts["models"][model]["prunable"])
        except (KeyError, TypeError, ValueError):
            return None


def read_results(folder: Path) -> Results:
    """Read the results of `fastsal sweep` or `fastsal transfer`.

    Raises:
        InvalidArgument: the folder holds something else; says what is missing.
        FileFormatError: a file in it is damaged, or of another format; names file, line and column.
    """
    _check_kind(folder)
    facts = _read_facts(folder / "study.json")
    path = folder / "results.csv"
    rows = read_rows(path, Row, skip=_failed)
    failures = read_rows(path, Failure, skip=lambda record: not _failed(record))
    statuses = read_records(path, ["study", "status"])
    for line, record in statuses:
        if record["status"] not in ("done", "failed"):
            raise FileFormatError(
                f"{path}, line {line}, status: got {record['status']!r}; takes done or failed"
            )
    if not statuses:
        raise FileFormatError(f"{path}: holds no row; the study has no finished cell yet")
    _check_once(path, rows)
    return Results(
        folder=folder,
        name=str(facts.get("name") or statuses[0][1]["study"]),
        facts=facts,
        rows=rows,
        failures=failures,
        layers=_optional(folder / "layers.csv", Layer),
        landscape=_optional(folder / "landscape.csv", Landscape),
        overlap=_optional(folder / "overlap.csv", Overlap),
        methods=_methods(facts, [*rows, *failures]),
    )


def in_order(found: Iterable[Key]) -> list[Key]:
    """Return each value once, in the order of its first appearance."""
    return list(dict.fromkeys(found))


def _failed(record: dict[str, str]) -> bool:
    return record.get("status") == "failed"


def _check_kind(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InvalidArgument(f"dir: {folder} {what}; takes a folder of a study's results")
    missing = [n for n in ("study.json", "results.csv") if not (folder / n).is_file()]
    if not missing:
        return
    message = f"dir: {folder} is no folder of a study's results: it holds no {missing[0]}"
    if (folder / "masks.safetensors").is_file():
        message += (
            "; it is a run of `fastsal prune`, whose numbers are in its report.json. "
            "A study comes from `fastsal transfer` or `fastsal sweep`"
        )
    elif missing == ["results.csv"]:
        message += "; the study has not come to its end: the same command goes on with it"
    raise InvalidArgument(message)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path}: is no JSON ({error})") from None
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != FORMAT:
        raise FileFormatError(f"{path}: got format {found!r}; takes {FORMAT}")
    result: dict[str, Any] = facts
    return result


def _optional(path: Path, kind: type[Key]) -> list[Key]:
    return read_rows(path, kind) if path.is_file() else []


def _check_once(path: Path, rows: list[Row]) -> None:
    """A task that stands twice in a cell would weigh twice in every mean."""
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        point = (row.model, row.source, row.criterion, row.rounds, row.sparsity, row.seed, row.task)
        if point in seen:
            raise FileFormatError(f"{path}: task {row.task!r} stands twice in cell {row.cell!r}")
        seen.add(point)


def _methods(facts: dict[str, Any], rows: list[Any]) -> dict[tuple[str, int], Method]:
    """Order methods as the study lists its criteria; name the rounds where they differ."""
    found = in_order((row.criterion, row.rounds) for row in rows)
    settings = facts.get("settings")
    listed = settings.get("criteria", []) if isinstance(settings, dict) else []
    names = [c.get("name") if isinstance(c, dict) else c for c in listed]
    place = {name: i for i, name in enumerate(names)}
    found.sort(key=lambda key: (place.get(key[0], len(place)), key[0] if place else "", key[1]))
    several = {c for c in {k[0] for k in found} if sum(k[0] == c for k in found) > 1}
    methods = {}
    for i, (criterion, rounds) in enumerate(found):
        label = criterion
        if criterion in several:
            label += f", {rounds} round{'s' if rounds > 1 else ''}"
        methods[criterion, rounds] = Method(criterion, rounds, label, i)
    return methods
