"""Figures of loss lines and Fisher overlaps."""

from __future__ import annotations

from collections.abc import Sequence

from fastsal.study.folder_format import DENSE_PRUNED, SOURCE
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
from fastsal.study.report.results import LossLine, Overlap, in_order


def loss_lines(section: Section, rows: Sequence[LossLine], ids: Ids) -> list[tuple[float, Figure]]:
    """Draw the loss along the line from the dense to the pruned to the fine-tuned model.

    Returns:
        `(sparsity, figure)` with one panel per task; values are means over seeds.
    """
    own = [r for r in rows if (r.model, r.source) == (section.model, section.source)
           and r.loss is not None]  # fmt: skip
    return [
        (sparsity, _lines_at(section, [r for r in own if r.sparsity == sparsity], ids))
        for sparsity in sorted({r.sparsity for r in own})
    ]


def overlaps(section: Section, rows: Sequence[Overlap], ids: Ids) -> Figure | None:
    """Draw the overlap of the Fisher statistics of the source with those of each task."""
    own = [r for r in rows if (r.model, r.source) == (section.model, section.source)]
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
        text = f"Fisher overlap with the source in {wording.number(len(names), 'layer')}, {task}."
        panels.append(svg(panel, text, ids))
    return Figure(
        panels,
        "Overlap of the Fisher statistics of the source with those of each task, per layer, 0 to "
        "1, mean over seeds. Solid lines, round marks: cosine similarity of the diagonals. Dashed "
        "lines, square marks: overlap of the leading eigenspaces of the blocks.",
        Table(["task", "position", "layer", "diagonal", "eigenspace"], table,
              frozenset({1, 3, 4})),
    )  # fmt: skip


def _lines_at(section: Section, rows: Sequence[LossLine], ids: Ids) -> Figure:
    losses = [r.loss for r in rows if r.loss is not None]
    y = linear_axis(min(losses), max(losses), 5, "mean loss, nats")
    left = 12 + LETTER * 11 * max(len(text) for _, text in y.ticks)
    tuned = any(r.path != DENSE_PRUNED for r in rows)
    ends = [(0.0, "dense"), (1.0, "pruned"), (2.0, "fine-tuned")][: 3 if tuned else 2]
    x = Axis(-0.08, ends[-1][0] + 0.08, ends)
    panels, table = [], []
    for task, role in in_order((r.task, r.role) for r in sorted(rows, key=_source_first)):
        panel = Panel(task, x, y, SOURCE if role == SOURCE else "", top=42, bottom=26,
                      left=left, right=24 if tuned else 10)  # fmt: skip
        ends_of = []
        for variant in section.variants:
            values: dict[float, list[float]] = {}
            for r in rows:
                if (r.task, r.criterion, r.rounds) == (task, variant.criterion, variant.rounds):
                    at = r.t if r.path == DENSE_PRUNED else 1 + r.t
                    values.setdefault(at, []).append(r.loss or 0.0)
            points = [(t, mean(values[t]), None, None) for t in sorted(values)]
            if points:
                panel.line(Series(variant.index, variant.label, points))
                ends_of.append(f"{variant.label}: {points[0][1]:.3g} to {points[-1][1]:.3g}")
            table += [[task, variant.label, f"{t:.3g}", f"{m:.4g}"] for t, m, _, _ in points]
        panels.append(svg(panel, f"{task}. Loss at both ends: {'; '.join(ends_of)}.", ids))
    present = {(r.criterion, r.rounds) for r in rows}
    return Figure(
        panels,
        "Mean loss on test images along the straight line from the dense to the pruned weights"
        + (", and from the pruned to the fine-tuned weights" if tuned else "")
        + "; mean over seeds.",
        Table(["task", "criterion", "position (0 dense, 1 pruned, 2 fine-tuned)", "loss, nats"],
              table,
              frozenset({2, 3})),
        [m for m in section.variants if (m.criterion, m.rounds) in present],
    )  # fmt: skip


def _source_first(row: LossLine) -> bool:
    return row.role != SOURCE
