"""Read the runs of a folder: accuracy, sizes and measured latency of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.utils.json_files import read_json

REPORT_FILE, MEASUREMENT_FILE = "report.json", "measurement.json"


@dataclass(frozen=True)
class Latency:
    """Latency of a model beside its original, for one number of images.

    Attributes:
        batch: Images of a forward pass.
        speedup: Median of the ratios of neighboring runs, and their quartiles.
        verdict: The same in words, or that the model is not faster.
        where: Runtime, processor and threads.
    """

    batch: int
    speedup: tuple[float, float, float]
    verdict: str
    where: str


@dataclass(frozen=True)
class RunPoint:
    """A pruned model.

    Attributes:
        name: Name of its folder.
        model: The original model.
        method: What was removed, and by which criterion.
        sparsity: Fraction that was asked for, of weights or of units.
        accuracy: Top-1 accuracy, 0 to 1.
        dense_accuracy: The same of the original.
        test_images: Images of both.
        latencies: In the order in which they were measured; none if the run was not measured.
        file_bytes: The smallest lossless file, of dense tensors or packed; None if not measured.
        dense_bytes: The file of the original; None if not measured.
    """

    name: str
    model: str
    method: str
    sparsity: float
    accuracy: float
    dense_accuracy: float
    test_images: int
    latencies: tuple[Latency, ...]
    file_bytes: int | None
    dense_bytes: int | None

    @property
    def file_ratio(self) -> float | None:
        """The file, as a fraction of that of the original; None if not measured."""
        if self.file_bytes is None or not self.dense_bytes:
            return None
        return self.file_bytes / self.dense_bytes


@dataclass(frozen=True)
class RunResults:
    """The runs of a folder.

    Attributes:
        name: Name of the folder.
        points: Runs with an accuracy, in the order of their names.
        without_accuracy: Names of the others.
    """

    name: str
    points: list[RunPoint]
    without_accuracy: list[str]


def has_runs(folder: Path) -> bool:
    """Return whether a folder has folders of runs in it."""
    return any(folder.glob(f"*/{REPORT_FILE}"))


def read_runs(folder: Path) -> RunResults:
    """Read the runs of a folder.

    Raises:
        FileFormatError: A file is not that of a run.
        InvalidArgument: No run has an accuracy.
    """
    points, without = [], []
    for path in sorted(folder.glob(f"*/{REPORT_FILE}")):
        report = read_json(path, "report")
        try:
            if not report.get("accuracy", {}).get("after"):
                without.append(path.parent.name)
                continue
            points.append(_point(path.parent, report))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise FileFormatError(
                f"DIR: {path.parent} is not a run ({type(error).__name__}: {error})"
            ) from None
    if not points:
        raise InvalidArgument(
            f"DIR must have runs with an accuracy (fastsal prune --test), got {folder} without one"
        )
    return RunResults(folder.resolve().name, points, without)


def _point(folder: Path, report: Mapping[str, Any]) -> RunPoint:
    arguments, accuracy = report["arguments"], report["accuracy"]
    measured: Mapping[str, Any] = {}
    if (folder / MEASUREMENT_FILE).is_file():
        measured = read_json(folder / MEASUREMENT_FILE, "measurement")
    sizes = {name: measured[name] for name in ("dense", "pruned") if measured}
    return RunPoint(
        name=folder.name,
        model=Path(str(arguments["model"])).name,
        method=_method(arguments),
        sparsity=float(
            report["sparsity"] if arguments.get("structure") is None else arguments["sparsity"]
        ),
        accuracy=float(accuracy["after"]["accuracy"]),
        dense_accuracy=float(accuracy["before"]["accuracy"]),
        test_images=int(accuracy["after"]["samples"]),
        latencies=tuple(_latency(each, measured) for each in measured.get("timings", ())),
        file_bytes=min(
            (
                int(size)
                for name in ("dense_bytes", "packed_bytes")
                if sizes and (size := sizes["pruned"][name]) is not None
            ),
            default=None,
        ),
        dense_bytes=int(sizes["dense"]["dense_bytes"]) if sizes else None,
    )


def _method(arguments: Mapping[str, Any]) -> str:
    """Return the words by which runs are grouped."""
    structure = arguments.get("structure")
    if structure is None:
        words = [str(arguments["criterion"])]
        words += [str(arguments["pattern"])] if arguments.get("pattern") else []
    else:
        what = {"mlp": "MLP units", "heads": "heads", "channels": "channels"}[structure]
        words = [what, str(arguments["unit_criterion"])]
        budget = {"parameters": "by parameters", "macs": "by MACs", "latency": "by latency"}
        words += [budget[arguments["budget"]]] if arguments.get("budget") in budget else []
    if arguments.get("compensate") is False:
        words.append("not compensated")
    if arguments.get("refit"):
        words.append("refitted")
    return ", ".join(words)


def _latency(timing: Mapping[str, Any], measured: Mapping[str, Any]) -> Latency:
    facts = measured["machine"]
    threads = int(facts["threads"])
    middle, low, high = map(float, timing["speedup"])
    return Latency(
        batch=int(timing["batch"]),
        speedup=(middle, low, high),
        verdict=str(timing["verdict"]),
        where=f"{measured['runtime']}, {facts['processor']}, {threads} "
        f"thread{'s' if threads != 1 else ''}",
    )
