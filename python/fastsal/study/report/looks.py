"""The figures of the loss landscape: losses along lines, and overlaps of Fishers."""

from __future__ import annotations

from collections.abc import Sequence

from fastsal.study.report import wording
from fastsal.study.report.chart import (
    LETTER,
    Axis,
    Ids,
    Panel,
    Series,
    counted_axis,
    linear_axis,
    svg,
)
from fastsal.study.report.figures import Figure, Table
from fastsal.study.report.findings import Section
from fastsal.study.report.intervals import mean
from fastsal.study.report.results import DENSE_PRUNED, SOURCE, Landscape, Overlap, in_order


def paths(part: Section, rows: Sequence[Landscape], ids: Ids) -> list[tuple[float, Figure]]:
    """Loss along the line from the dense model to the pruned and on to the tuned one.

    Returns:
        `(sparsity, figure)`, a panel a task, mean over seeds.
    """
    own = [r for r in rows if (r.model, r.source) == (part.model, part.source)
           and r.loss is not None]  # fmt: skip
    return [
        (sparsity, _paths_at(part, [r for r in own if r.sparsity == sparsity], ids))
        for sparsity in sorted({r.sparsity for r in own})
    ]


def overlaps(part: Section, rows: Sequence[Overlap], ids: Ids) -> Figure | None:
    """Overlap of the source's Fisher with that of each task, layer by layer."""
    own = [r for r in rows if (r.model, r.source) == (part.model, part.source)]
    if not own:
        return None
    names = {r.position: r.layer for r in own}
    axis = counted_axis(max(names) + 1, "layer, from input to output")
    panels, table = [], []
    for task in in_order(r.task for r in own):
        here = [r for r in own if r.task == task]
        panel = Panel(task, axis, linear_axis(0, 1))
        both: list[dict[int, list[float]]] = []
        for i, kind in enumerate(("diagonal", "eigenspace")):
            values: dict[int, list[float]] = {}
            both.append(values)
            for r in here:
                value = getattr(r, kind)
                if value is not None:
                    values.setdefault(r.position, []).append(value)
            points = [(p + 1, mean(values[p]), None, None) for p in sorted(values)]
            if points:
                panel.line(Series(i, kind, points, after=i == 1))
        for p in sorted({r.position for r in here}):
            table.append([task, str(p + 1), names[p], *(
                f"{mean(v[p]):.3f}" if p in v else wording.NONE for v in both
            )])  # fmt: skip
        text = f"Overlap with the source's Fisher in {wording.number(len(names), 'layer')}, {task}."
        panels.append(svg(panel, text, ids))
    return Figure(
        panels,
        "Overlap of the Fisher of the source with that of each task, 0 to 1, layer by layer, mean "
        "over seeds. Solid, round marks: of the diagonals. Dashed, square marks: of the leading "
        "eigenvectors of the blocks.",
        Table(["task", "position", "layer", "diagonal", "eigenspace"], table,
              frozenset({1, 3, 4})),
    )  # fmt: skip


def _paths_at(part: Section, rows: Sequence[Landscape], ids: Ids) -> Figure:
    losses = [r.loss for r in rows if r.loss is not None]
    y = linear_axis(min(losses), max(losses), 5, "mean loss, nats")
    left = 12 + LETTER * 11 * max(len(text) for _, text in y.ticks)
    tuned = any(r.path != DENSE_PRUNED for r in rows)
    ends = [(0.0, "dense"), (1.0, "pruned"), (2.0, "tuned")][: 3 if tuned else 2]
    x = Axis(-0.08, ends[-1][0] + 0.08, ends)
    panels, table = [], []
    for task, role in in_order((r.task, r.role) for r in sorted(rows, key=_source_first)):
        panel = Panel(task, x, y, SOURCE if role == SOURCE else "", top=42, bottom=26,
                      left=left)  # fmt: skip
        ends_of = []
        for method in part.methods:
            values: dict[float, list[float]] = {}
            for r in rows:
                if (r.task, r.criterion, r.rounds) == (task, method.criterion, method.rounds):
                    at = r.t if r.path == DENSE_PRUNED else 1 + r.t
                    values.setdefault(at, []).append(r.loss or 0.0)
            points = [(t, mean(values[t]), None, None) for t in sorted(values)]
            if points:
                panel.line(Series(method.index, method.label, points))
                ends_of.append(f"{method.label}: {points[0][1]:.3g} to {points[-1][1]:.3g}")
            table += [[task, method.label, f"{t:.3g}", f"{m:.4g}"] for t, m, _, _ in points]
        panels.append(svg(panel, f"{task}. Loss at both ends. {'; '.join(ends_of)}.", ids))
    present = {(r.criterion, r.rounds) for r in rows}
    return Figure(
        panels,
        "Mean loss on test images along the straight line from the dense weights to the pruned "
        "ones" + (", and from there to the fine-tuned ones" if tuned else "")
        + "; mean over seeds.",
        Table(["task", "criterion", "position (0 dense, 1 pruned, 2 tuned)", "loss, nats"], table,
              frozenset({2, 3})),
        [m for m in part.methods if (m.criterion, m.rounds) in present],
    )  # fmt: skip


def _source_first(row: Landscape) -> bool:
    return row.role != SOURCE
