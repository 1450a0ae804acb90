"""Render the report of a folder of runs: accuracy against latency and against the file size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastsal.study.report import palette, wording
from fastsal.study.report.chart import Axis, Ids, Panel, Series, linear_axis, marker, svg, wrap
from fastsal.study.report.figures import Table
from fastsal.study.report.markdown import table as markdown_table
from fastsal.study.report.rendering import rendered
from fastsal.study.report.run_results import RunPoint, RunResults
from fastsal.study.report.tradeoff import Pick, nothing_kept, picks


@dataclass(frozen=True)
class ModelView:
    """What the page shows of one original model.

    Attributes:
        name: The model.
        summary: One line about the runs.
        picks: The runs that a user would pick.
        no_pick: Why there are none; empty if there are.
        methods: Names of the lines in the figures, in the order of their colors.
        panels: Figures.
        note: What was measured, where.
        table: All runs.
    """

    name: str
    summary: str
    picks: list[Pick]
    no_pick: str
    methods: list[str]
    panels: list[str]
    note: str
    table: Table


def html(results: RunResults, margin: float) -> str:
    """Return the report as one self-contained HTML page.

    Args:
        results: The runs.
        margin: Loss in percentage points up to which a run keeps the accuracy.

    Raises:
        FastsalError: jinja2 is not installed.
    """
    ids = Ids()
    return rendered(
        "runs.html.j2",
        results=results,
        views=_views(results, margin, ids),
        margin=f"{margin:g}",
        light=palette.LIGHT,
        dark=palette.DARK,
        swatch=lambda i: wrap(marker(i, 14, 7), 28, 14, "", "", ids),
        color=palette.color,
    )


def markdown(results: RunResults, margin: float) -> str:
    """Return the report as Markdown, without figures."""
    lines = [f"# {results.name}", ""]
    for view in _views(results, margin, Ids()):
        lines += [f"## {view.name}", "", view.summary, ""]
        lines += [f"- **{pick.point.name}**: {pick.text}" for pick in view.picks] or [view.no_pick]
        lines += ["", *markdown_table(view.table.columns, view.table.rows, view.table.numeric), ""]
        lines += [f"*{view.note}*", ""] if view.note else []
    if results.without_accuracy:
        lines += [f"Without an accuracy: {', '.join(results.without_accuracy)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _views(results: RunResults, margin: float, ids: Ids) -> list[ModelView]:
    models = dict.fromkeys(point.model for point in results.points)
    return [_view(m, [p for p in results.points if p.model == m], margin, ids) for m in models]


def _view(model: str, points: Sequence[RunPoint], margin: float, ids: Ids) -> ModelView:
    methods = list(dict.fromkeys(point.method for point in points))
    found = picks(points, margin)
    dense = points[0].dense_accuracy
    x_axes: list[tuple[str, Callable[[RunPoint], float | None], float | None]] = [
        ("sparsity, %", lambda p: 100 * p.sparsity, 0.0)
    ]
    latency = next((p.latencies[0] for p in points if p.latencies), None)
    if latency is not None:
        batch = latency.batch
        name = f"latency of {wording.number(batch, 'image')}, relative to the original"
        x_axes.insert(0, (name, lambda p: _relative_latency(p, batch), 1.0))
    if any(p.file_bytes for p in points):
        x_axes.insert(1, ("file, relative to the original", lambda p: p.file_ratio, 1.0))
    panels = [
        _panel(title, of, origin, points, methods, dense, found, ids)
        for title, of, origin in x_axes
    ]
    places = sorted({each.where for point in points for each in point.latencies})
    return ModelView(
        name=model,
        summary=f"{wording.number(len(points), 'run')}; the original has an accuracy of "
        f"{100 * dense:.1f} % on {points[0].test_images:,} test images.",
        picks=found,
        no_pick="" if found else nothing_kept(points, margin),
        methods=methods,
        panels=panels,
        note=f"Latencies: {'; '.join(places)}." if places else "No latency was measured.",
        table=_table(points),
    )


def _relative_latency(point: RunPoint, batch: int) -> float | None:
    found = next((each for each in point.latencies if each.batch == batch), None)
    return None if found is None else 1 / found.speedup[0]


def _panel(
    title: str,
    of: Callable[[RunPoint], float | None],
    origin: float | None,
    points: Sequence[RunPoint],
    methods: Sequence[str],
    dense: float,
    found: Sequence[Pick],
    ids: Ids,
) -> str:
    placed = [(x, p) for p in points if (x := of(p)) is not None]
    values = [x for x, _ in placed] + ([] if origin is None else [origin])
    shares = [100 * p.accuracy for _, p in placed] + [100 * dense]
    x_axis = linear_axis(min(values), max(values))
    panel = Panel(
        "Accuracy, %",
        Axis(x_axis.low, x_axis.high, x_axis.ticks, title),
        linear_axis(max(0, min(shares)), min(100, max(shares))),
    )
    panel.level(100 * dense, f"original {100 * dense:.1f}")
    described = []
    for index, method in enumerate(methods):
        own = sorted(((x, p) for x, p in placed if p.method == method), key=lambda each: each[0])
        panel.line(Series(index, method, [(x, 100 * p.accuracy, None, None) for x, p in own]))
        described += [f"{p.name}: {100 * p.accuracy:.1f} % at {x:.3g}" for x, p in own]
    for pick in found:
        x = of(pick.point)
        if x is not None:
            at = panel.px(x), panel.py(100 * pick.point.accuracy)
            panel.add(f'<circle class="ring" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="8"/>')
    return svg(panel, f"{title}. {'; '.join(described)}", ids)


def _table(points: Sequence[RunPoint]) -> Table:
    batches = list(dict.fromkeys(each.batch for point in points for each in point.latencies))
    columns = ["run", "removed", "sparsity, %", "accuracy, %", "change, points"]
    columns += [f"speed, {wording.number(batch, 'image')}" for batch in batches]
    columns += ["file"]
    rows = []
    for point in points:
        row = [
            point.name,
            point.method,
            f"{100 * point.sparsity:.1f}",
            f"{100 * point.accuracy:.1f}",
            wording.points(100 * (point.accuracy - point.dense_accuracy)),
        ]
        for batch in batches:
            each = next((e for e in point.latencies if e.batch == batch), None)
            row.append("" if each is None else each.verdict)
        row.append("" if point.file_ratio is None else f"{point.file_ratio:.2f}")
        rows.append(row)
    return Table(columns, rows, frozenset({2, 3, 4, len(columns) - 1}))
