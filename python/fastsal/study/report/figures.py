"""Figures of a study, each with a table of its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastsal.study.folder_format import SOURCE
from fastsal.study.report import wording
from fastsal.study.report.chart import (
    Axis,
    Ids,
    Panel,
    Series,
    counted_axis,
    linear_axis,
    log_axis,
    marker,
    svg,
    variant_group,
)
from fastsal.study.report.findings import Section
from fastsal.study.report.intervals import band, mean
from fastsal.study.report.results import Layer, Variant


@dataclass(frozen=True)
class Table:
    """A table of strings; columns in `numeric` are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A figure of one or more panels.

    Attributes:
        panels: `svg` elements.
        caption: Caption of the figure.
        table: Values of the figure.
        variants: Entries of the legend; empty for none.
        tuned: Whether the figure has lines after fine-tuning.
        drawn: Panels before rendering, for a picture of all of them.
    """

    panels: list[str]
    caption: str
    table: Table
    variants: list[Variant] = field(default_factory=list)
    tuned: bool = False
    drawn: list[Panel] = field(default_factory=list)


def accuracy(section: Section, ids: Ids) -> Figure:
    """Draw accuracy versus sparsity before and after fine-tuning, one panel per task."""
    tuned = any(row.tuned is not None for row in section.rows)
    lines: dict[str, list[Series]] = {}
    dense: dict[str, float] = {}
    table = []
    for task, role in section.tasks:
        rows = [row for row in section.rows if row.task == task]
        dense[task] = 100 * mean([row.dense for row in rows])
        lines[task] = []
        for variant in section.variants:
            before = _curve(section, variant, task, after=False)
            after = _curve(section, variant, task, after=True)
            lines[task] += [s for s in (before, after) if s.points]
            later = {p[0]: p for p in after.points}
            for p in before.points:
                table.append([task, role, variant.label, f"{p[0]:g}", f"{dense[task]:.1f}",
                              _ranged(p), _ranged(later.get(p[0]))])  # fmt: skip
    values = [v for series in lines.values() for s in series for p in s.points
              for v in p[1:] if v is not None]  # fmt: skip
    y = linear_axis(max(0, min([*values, *dense.values()])),
                    min(100, max([*values, *dense.values()])))  # fmt: skip
    panels = []
    for task, role in section.tasks:
        panel = Panel(task, sparsity_axis(section.sparsities), y, SOURCE if role == SOURCE else "")
        panel.level(dense[task], f"dense {dense[task]:.1f}")
        _lines(panel, lines[task], len(section.variants))
        panels.append(panel)
    columns = ["task", "role", "criterion", "sparsity, %", "dense", "pruned", "fine-tuned"]
    shown = 7 if tuned else 6
    n = len(section.seeds)
    what = "Bands" if len(section.sparsities) > 1 else "Whiskers"
    spread = {1: "One seed, no interval.", 2: f"{what}: range of two seeds."}
    return Figure(
        panels=[svg(p, _described(p, lines[p.title]), ids) for p in panels],
        caption=(
            "Top-1 accuracy in % versus the fraction of weights pruned. "
            + ("Solid lines, filled marks: pruned, not fine-tuned. Dashed lines, hollow marks: "
               "after fine-tuning on the source. " if tuned else "Pruned, not fine-tuned. ")
            + "Dotted line: dense model. "
            + spread.get(n, f"{what}: 95% t-intervals over {n} seeds.")
        ),
        table=Table(columns[:shown], [row[:shown] for row in table], frozenset({3, 4, 5, 6})),
        variants=section.variants,
        tuned=tuned,
        drawn=panels,
    )  # fmt: skip


def layers(section: Section, rows: Sequence[Layer], ids: Ids) -> Figure | None:
    """Draw the fraction of weights kept in every layer, one panel per sparsity."""
    own = [r for r in rows if (r.model, r.source) == (section.model, section.source)]
    if not own:
        return None
    names = {r.position: r.layer for r in own}
    order = sorted(names)
    kept: dict[tuple[str, int, float, int], list[float]] = {}
    for r in own:
        share = 100 * (1 - r.pruned / r.weights) if r.weights else 100.0
        kept.setdefault((r.criterion, r.rounds, r.sparsity, r.position), []).append(share)
    x = counted_axis(order[-1] + 1, "layer, from input to output")
    panels, table = [], []
    for sparsity in section.pruned_at:
        panel = Panel(wording.sparsity(sparsity) + " pruned", x, linear_axis(0, 100))
        panel.level(100 * (1 - sparsity), "")
        drawn = []
        for variant in section.variants:
            keys = [(variant.criterion, variant.rounds, sparsity, p) for p in order]
            points = [(k[3] + 1, mean(kept[k]), None, None) for k in keys if k in kept]
            drawn.append(Series(variant.index, variant.label, points))
        _lines(panel, drawn, 1)
        panels.append(svg(panel, _described(panel, drawn, "layer"), ids))
        by_layer = {s.index: {p[0]: p[1] for p in s.points} for s in drawn}
        for p in order:
            cells = [by_layer[m.index].get(p + 1) for m in section.variants]
            table.append([wording.sparsity(sparsity), str(p + 1), names[p],
                          *(wording.NONE if c is None else f"{c:.1f}" for c in cells)])  # fmt: skip
    return Figure(
        panels,
        "Weights kept per layer in %, mean over seeds. Dotted line: uniform sparsity.",
        Table(["sparsity", "position", "layer", *(m.label for m in section.variants)], table,
              frozenset({0, 1, *range(3, 3 + len(section.variants))})),
        section.variants,
    )  # fmt: skip


def predicted(section: Section, ids: Ids) -> Figure | None:
    """Draw the measured versus the predicted increase of the loss, one mark per cell."""
    cells = {row.cell: row for row in section.rows}.values()
    pairs = [(row, row.predicted_increase, row.measured_increase) for row in cells]
    both = [(r, p, m) for r, p, m in pairs if p is not None and m is not None]
    shown = [(r, p, m) for r, p, m in both if p > 0 and m > 0]
    if not both:
        return None
    variants = {(m.criterion, m.rounds): m for m in section.variants}
    table = [
        [variants[r.criterion, r.rounds].label, wording.sparsity(r.sparsity), str(r.seed),
         f"{p:.3g}", f"{m:.3g}", f"{m / p:.3g}" if p > 0 else wording.NONE]
        for r, p, m in both
    ]  # fmt: skip
    panels = []
    within = sum(0.5 <= m / p <= 2 for _, p, m in shown)
    if shown:
        values = [v for _, p, m in shown for v in (p, m)]
        axis = log_axis(values)
        x = Axis(axis.low, axis.high, axis.ticks, "predicted increase, nats", log=True)
        y = Axis(axis.low, axis.high, axis.ticks, "measured increase, nats", log=True)
        panel = Panel("Measured versus predicted", x, y, width=340, height=320, top=40, left=40)
        a, b = axis.low, axis.high
        panel.add(f'<path class="ref" d="M{panel.px(a):.1f} {panel.py(a):.1f}'
                  f'L{panel.px(b):.1f} {panel.py(b):.1f}"/>')  # fmt: skip
        for r, p, m in shown:
            index = variants[r.criterion, r.rounds].index
            mark = f'<g class="dot">{marker(index, panel.px(p), panel.py(m))}</g>'
            panel.add(variant_group(index, mark))
        text = f"{len(shown)} cells, {within} within a factor of two of the prediction."
        panels.append(svg(panel, text, ids))
    caption = (
        "Increase of the mean loss on the test images of the source, before fine-tuning, versus "
        "the prediction of the quadratic model (δᵀAδ / 2). One mark per cell; dotted line: "
        "equality. The measured increase is within a factor of two of the prediction in "
        f"{within} of {wording.number(len(both), 'cell')}."
    )
    if len(shown) < len(both):
        left = wording.number(len(both) - len(shown), "cell")
        caption += f" {left} with an increase at or below 0 not drawn; the table lists all."
    return Figure(
        panels, caption,
        Table(["criterion", "sparsity", "seed", "predicted", "measured", "ratio"], table,
              frozenset({1, 2, 3, 4, 5})),
        [v for v in section.variants
         if any(variants[r.criterion, r.rounds] == v for r, _, _ in both)],
    )  # fmt: skip


def sparsity_axis(sparsities: Sequence[float]) -> Axis:
    """Return an axis in % with the sparsities of the study as ticks, thinned out to fit."""
    low, high = 100 * sparsities[0], 100 * sparsities[-1]
    text = "weights pruned, %"
    if low == high:
        return Axis(low - 1, high + 1, [(low, f"{low:.6g}")], text)
    pad = 0.05 * (high - low)
    ticks: list[tuple[float, str]] = []
    for s in reversed(sparsities):  # the highest sparsity always has a tick
        value = 100 * s
        if not ticks or ticks[-1][0] - value > 0.115 * (high - low):
            ticks.append((value, f"{value:.6g}"))
    return Axis(low - pad, high + pad, ticks[::-1], text)


def _curve(section: Section, variant: Variant, task: str, after: bool) -> Series:
    points = []
    for sparsity in section.sparsities:
        rows = section.select(variant, sparsity, task)
        found = [row.tuned if after else row.pruned for row in rows]
        values = [100 * v for v in found if v is not None]
        if values:
            b = band(values)
            low = None if b.low is None else max(0.0, b.low)
            high = None if b.high is None else min(100.0, b.high)
            points.append((100 * sparsity, b.mean, low, high))
    return Series(variant.index, variant.label, points, after)


def _lines(panel: Panel, lines: Sequence[Series], variants: int) -> None:
    """Draw lines; for a single sparsity, draw marks with whiskers side by side."""
    single = len(panel.x.ticks) == 1 and variants > 0 and all(len(s.points) < 2 for s in lines)
    order = sorted({s.index for s in lines})
    step = min(16.0, 200 / max(len(order), 1))
    # Draw lines after fine-tuning first, so that their bands do not hide the others.
    for series in sorted(lines, key=lambda s: not s.after):
        dodge = 0.0
        if single:
            dodge = step * (order.index(series.index) - (len(order) - 1) / 2)
            dodge += 0.25 * step if series.after else -0.25 * step
        panel.line(series, dodge, whiskers=single)


def _ranged(point: tuple[float, float, float | None, float | None] | None) -> str:
    if point is None:
        return wording.NONE
    _, middle, low, high = point
    if low is None or high is None:
        return f"{middle:.1f}"
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _described(panel: Panel, lines: Sequence[Series], x: str = "sparsity") -> str:
    """Describe the first and the last point of every line."""
    texts = []
    for s in lines:
        if not s.points or not math.isfinite(s.points[0][1]):
            continue
        stage = " after fine-tuning" if s.after else ""
        (a, first, *_), (b, last, *_) = s.points[0], s.points[-1]
        route = f"{first:.1f} at {x} {a:g}"
        if len(s.points) > 1:
            route += f" to {last:.1f} at {b:g}"
        texts.append(f"{s.label}{stage}: {route}")
    return f"{panel.title}. {'; '.join(texts)}."
