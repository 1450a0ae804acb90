"""Write accuracy versus sparsity as a self-contained SVG file, for light and dark mode."""

from __future__ import annotations

import math
import re
from html import escape
from importlib.resources import files
from pathlib import Path

from fastsal.study.report import figures, palette
from fastsal.study.report.chart import Ids, marker, n, variant_group, wrap
from fastsal.study.report.findings import Section
from fastsal.study.report.results import Variant
from fastsal.utils.atomic import write_text

_GAP, _EDGE, _COLUMNS = 22.0, 14.0, 3
_LETTER = 6.4  # width of a letter in the legend


def write_pictures(sections: list[Section], folder: Path) -> dict[tuple[str, str], Path]:
    """Write one SVG file per model and source.

    Returns:
        `{(model, source): path}`.

    Raises:
        OSError: The folder cannot be written.
    """
    written: dict[tuple[str, str], Path] = {}
    for section in sections:
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", f"accuracy-{section.model}-{section.source}").strip(
            "-"
        )
        path, number = folder / f"{stem[:100]}.svg", 1
        while path in written.values():
            number += 1
            path = folder / f"{stem[:100]}-{number}.svg"
        write_text(path, picture(section))
        written[section.model, section.source] = path
    return written


def picture(section: Section) -> str:
    """Return the SVG of one model and source.

    The colors are part of the file, with a media query for dark mode, as an image in a Markdown
    page cannot use a style sheet of the page.
    """
    ids = Ids()
    figure = figures.accuracy(section, ids)
    drawn = figure.drawn
    columns = 2 if len(drawn) == 4 else min(_COLUMNS, len(drawn))
    width = 2 * _EDGE + columns * drawn[0].width + (columns - 1) * _GAP
    legend, top = _legend(figure.variants, width)
    if figure.tuned:
        text = "solid: pruned, not fine-tuned; dashed: after fine-tuning on the source"
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
    title = f"Accuracy versus sparsity: {section.model}, pruned on {section.source}"
    style = f"<style>{_style()}</style>"
    return wrap(style + ground + "".join(body), width, height, title, figure.caption, ids) + "\n"


def _legend(variants: list[Variant], width: float) -> tuple[str, float]:
    """Return the legend, wrapped into lines, and its height."""
    x, y, parts = _EDGE, 18.0, []
    for variant in variants:
        room = 44 + _LETTER * len(variant.label) + 14
        if x > _EDGE and x + room > width - _EDGE:
            x, y = _EDGE, y + 20
        mark = f'<path class="ln" d="M{n(x)} {n(y)}h28"/>' + marker(variant.index, x + 14, y, 4)
        parts.append(variant_group(variant.index, mark))
        parts.append(
            f'<text class="nm" x="{n(x + 35)}" y="{n(y + 4)}">{escape(variant.label)}</text>'
        )
        x += room
    return "".join(parts), y + 14


def _style() -> str:
    css = files("fastsal.study.report").joinpath("templates/chart.css").read_text(encoding="utf-8")
    css = css.replace("\n", "") + ".paper{fill:var(--bg)}"
    light, dark = palette.concrete(css, palette.LIGHT), palette.concrete(css, palette.DARK)
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"
