"""Accuracy against sparsity as one SVG file that stands alone, in light and in dark."""

from __future__ import annotations

import math
import re
from html import escape
from importlib.resources import files
from pathlib import Path

from fastsal.study.report import figures, palette
from fastsal.study.report.chart import Ids, marker, method_group, n, wrap
from fastsal.study.report.findings import Section
from fastsal.study.report.results import Method
from fastsal.utils.atomic import write_text

_GAP, _EDGE, _COLUMNS = 22.0, 14.0, 3
_LETTER = 6.4  # width of a letter in the legend


def write_pictures(parts: list[Section], folder: Path) -> dict[tuple[str, str], Path]:
    """Write one picture a model and source.

    Returns:
        `{(model, source): path}`.

    Raises:
        OSError: the folder cannot be written.
    """
    written: dict[tuple[str, str], Path] = {}
    for part in parts:
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", f"accuracy-{part.model}-{part.source}").strip("-")
        path, number = folder / f"{stem[:100]}.svg", 1
        while path in written.values():
            number += 1
            path = folder / f"{stem[:100]}-{number}.svg"
        write_text(path, picture(part))
        written[part.model, part.source] = path
    return written


def picture(part: Section) -> str:
    """Return the picture of one model and source.

    Its colours are written out, a media query has those for a dark page: a picture in a Markdown
    page has no style sheet but its own.
    """
    ids = Ids()
    figure = figures.accuracy(part, ids)
    drawn = figure.drawn
    columns = 2 if len(drawn) == 4 else min(_COLUMNS, len(drawn))
    width = 2 * _EDGE + columns * drawn[0].width + (columns - 1) * _GAP
    legend, top = _legend(figure.methods, width)
    if figure.tuned:
        text = "solid: pruned, before any training; dashed: after fine-tuning on the source"
        legend += f'<text class="al" x="{n(_EDGE)}" y="{n(top + 12)}">{text}</text>'
        top += 22
    body = [legend]
    for i, panel in enumerate(drawn):
        x = _EDGE + (i % columns) * (panel.width + _GAP)
        y = top + 6 + (i // columns) * (panel.height + _GAP)
        body.append(f'<g transform="translate({n(x)} {n(y)})">{panel.body()}</g>')
    rows = math.ceil(len(drawn) / columns)
    height = top + 6 + rows * (drawn[0].height + _GAP)
    ground = f'<rect class="paper" width="{n(width)}" height="{n(height)}"/>'
    title = f"Accuracy against sparsity: {part.model}, pruned on {part.source}"
    style = f"<style>{_style()}</style>"
    return wrap(style + ground + "".join(body), width, height, title, figure.caption, ids) + "\n"


def _legend(methods: list[Method], width: float) -> tuple[str, float]:
    """Return the legend and the height that it takes; names flow into lines."""
    x, y, parts = _EDGE, 18.0, []
    for method in methods:
        room = 44 + _LETTER * len(method.label) + 14
        if x > _EDGE and x + room > width - _EDGE:
            x, y = _EDGE, y + 20
        mark = f'<path class="ln" d="M{n(x)} {n(y)}h28"/>' + marker(method.index, x + 14, y, 4)
        parts.append(method_group(method.index, mark))
        parts.append(
            f'<text class="nm" x="{n(x + 35)}" y="{n(y + 4)}">{escape(method.label)}</text>'
        )
        x += room
    return "".join(parts), y + 14


def _style() -> str:
    css = files("fastsal.study.report").joinpath("templates/chart.css").read_text(encoding="utf-8")
    css = css.replace("\n", "") + ".paper{fill:var(--bg)}"
    light, dark = palette.concrete(css, palette.LIGHT), palette.concrete(css, palette.DARK)
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"
