"""Small charts as inline SVG: axes, lines with bands, marks and whiskers.

Colors are set by CSS classes, so that one style sheet serves light mode, dark mode and print.
Lengths are in units of the view box; a panel is about as wide as a phone, so that text is not
scaled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from fastsal.study.report.palette import color, mark

_STAR = [(0.0, -1.0), (0.24, -0.32), (0.95, -0.31), (0.38, 0.12), (0.59, 0.81), (0.0, 0.4),
         (-0.59, 0.81), (-0.38, 0.12), (-0.95, -0.31), (-0.24, -0.32)]  # fmt: skip
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1.15), (1.05, 0.75), (-1.05, 0.75)],
    "down": [(0, 1.15), (1.05, -0.75), (-1.05, -0.75)],
    "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
    "hexagon": [(1.1, 0), (0.55, 0.95), (-0.55, 0.95), (-1.1, 0), (-0.55, -0.95), (0.55, -0.95)],
    "hourglass": [(-0.9, -1), (0.9, -1), (-0.9, 1), (0.9, 1)],
    "star": [(1.35 * x, 1.35 * y) for x, y in _STAR],
}
_STROKES = {"plus": "M{l} {y}H{r}M{x} {t}V{b}", "cross": "M{l} {t}L{r} {b}M{r} {t}L{l} {b}"}
LETTER, _BOLD = 0.56, 0.62  # mean width of a letter, relative to the font size
_MOST_MARKS = 12  # per line; only some points of a longer line are marked


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        low: Value at the lower end.
        high: Value at the upper end.
        ticks: `(value, text)` of each tick.
        label: Text of the axis.
        log: Whether the axis is logarithmic.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    label: str = ""
    log: bool = False

    def place(self, value: float) -> float:
        """Return the relative position of a value, 0 at the low end and 1 at the high end."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return (at - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True)
class Series:
    """Values of one criterion.

    Attributes:
        index: Index of its color and mark.
        label: Name in descriptions.
        points: `(x, mean, low, high)`; low and high may be None.
        after: Whether the values are those after fine-tuning.
    """

    index: int
    label: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    after: bool = False


@dataclass
class Panel:
    """One chart to draw into; `svg` renders it.

    Attributes:
        title: Text above the chart, shortened if too long.
        x: Horizontal axis.
        y: Vertical axis.
        tag: A word after the title.
        width: Total width, with axes.
        height: Total height, with axes.
        left: Margin for the labels of the vertical axis.
        right: Right margin.
        top: Top margin.
        bottom: Bottom margin.
        parts: SVG elements, in drawing order.
    """

    title: str
    x: Axis
    y: Axis
    tag: str = ""
    width: float = 300
    height: float = 212
    left: float = 36
    right: float = 10
    top: float = 34
    bottom: float = 36
    parts: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Return the horizontal coordinate of a value."""
        return self.left + self.x.place(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Return the vertical coordinate of a value."""
        return (
            self.height - self.bottom - self.y.place(value) * (self.height - self.top - self.bottom)
        )

    def add(self, part: str) -> None:
        """Add an SVG element on top of the others."""
        self.parts.append(part)

    def line(self, series: Series, dodge: float = 0.0, whiskers: bool = False) -> None:
        """Draw a line with marks, and a band or whiskers for points with bounds."""
        at = [(self.px(x) + dodge, self.py(m)) for x, m, _, _ in series.points]
        inner = []
        bounded = [(self.px(x) + dodge, self.py(low), self.py(high))
                   for x, _, low, high in series.points
                   if low is not None and high is not None]  # fmt: skip
        if whiskers:
            inner += [f'<path class="wh" d="M{n(x)} {n(a)}V{n(b)}"/>' for x, a, b in bounded]
        elif len(bounded) > 1:
            edge = [f"{n(x)} {n(b)}" for x, _, b in bounded]
            edge += [f"{n(x)} {n(a)}" for x, a, _ in reversed(bounded)]
            inner.append(f'<path class="band" d="M{"L".join(edge)}Z"/>')
        if len(at) > 1:
            inner.append(f'<path class="ln" d="M{"L".join(f"{n(x)} {n(y)}" for x, y in at)}"/>')
        every = math.ceil(len(at) / _MOST_MARKS)
        inner += [marker(series.index, x, y, hollow=series.after)
                  for i, (x, y) in enumerate(at) if i % every == series.index % every]  # fmt: skip
        self.add(variant_group(series.index, "".join(inner), series.after))

    def level(self, value: float, text: str) -> None:
        """Draw a horizontal reference line with a label at its right end."""
        y = self.py(value)
        self.add(f'<path class="ref" d="M{n(self.left)} {n(y)}H{n(self.width - self.right)}"/>')
        self.add(label(self.width - self.right, y - 4, text, "end", "rl"))

    def body(self) -> str:
        """Return the content of the chart without the enclosing `svg` element."""
        left, right = self.left, self.width - self.right
        top, bottom = self.top, self.height - self.bottom
        found = []
        room = self.width - 4 - (11 * _BOLD * len(self.tag) + 12 if self.tag else 0)
        title = cut(self.title, room, 13, _BOLD)
        found.append(label(2, 14, title, "start", "ti"))
        if self.tag:
            found.append(label(self.width - 2, 14, self.tag, "end", "tg"))
        for value, text in self.y.ticks:
            y = self.py(value)
            found.append(f'<path class="gr" d="M{n(left)} {n(y)}H{n(right)}"/>')
            found.append(label(left - 6, y + 3.5, text, "end", "tk"))
        found.append(f'<path class="ax" d="M{n(left)} {n(bottom)}H{n(right)}"/>')
        for value, text in self.x.ticks:
            x = self.px(value)
            found.append(f'<path class="ax" d="M{n(x)} {n(bottom)}v4"/>')
            found.append(label(x, bottom + 15, text, "middle", "tk"))
        if self.x.label:
            found.append(label((left + right) / 2, self.height - 4, self.x.label, "middle", "al"))
        if self.y.label:
            found.append(label(left, top - 4, self.y.label, "start", "al"))
        return "".join([*found, *self.parts])


class Ids:
    """Generator of unique element ids for a page."""

    def __init__(self, prefix: str = "f") -> None:
        self._prefix = prefix
        self._numbers: Iterator[int] = itertools.count(1)

    def new(self) -> str:
        """Return a new id."""
        return f"{self._prefix}{next(self._numbers)}"


def svg(panel: Panel, description: str, ids: Ids) -> str:
    """Return a panel as an `svg` element with a description for screen readers."""
    name = f"{panel.title} ({panel.tag})" if panel.tag else panel.title
    return wrap(panel.body(), panel.width, panel.height, name, description, ids)


def wrap(body: str, width: float, height: float, title: str, description: str, ids: Ids) -> str:
    """Return an `svg` element with a title, a description and the given content."""
    key = ids.new()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {n(width)} {n(height)}" '
        f'role="img" aria-labelledby="{key}t {key}d">'
        f'<title id="{key}t">{escape(title)}</title><desc id="{key}d">{escape(description)}</desc>'
        f"{body}</svg>"
    )


def variant_group(index: int, inner: str, after: bool = False) -> str:
    """Return a group in the color of a criterion, styled as before or after fine-tuning."""
    stage = "after" if after else "before"
    return f'<g class="{color(index)} {stage}" data-m="{index}">{inner}</g>'


def marker(index: int, x: float, y: float, radius: float = 3.4, hollow: bool = False) -> str:
    """Return the mark of a criterion at a position."""
    shape, kind = mark(index), "mk ho" if hollow else "mk"
    if shape == "circle":
        return f'<circle class="{kind}" cx="{n(x)}" cy="{n(y)}" r="{n(radius)}"/>'
    if shape in _STROKES:
        ends = {"x": x, "y": y, "l": x - radius, "r": x + radius, "t": y - radius, "b": y + radius}
        path = _STROKES[shape].format(**{k: n(v) for k, v in ends.items()})
        return f'<path class="{kind} st" d="{path}"/>'
    points = "L".join(f"{n(x + radius * a)} {n(y + radius * b)}" for a, b in _OUTLINES[shape])
    return f'<path class="{kind}" d="M{points}Z"/>'


def whisker(
    panel: Panel, index: int, y: float, middle: float, ends: tuple[float | None, float | None],
    after: bool,
) -> None:  # fmt: skip
    """Draw a mark and its horizontal interval; an end outside the axis becomes an arrowhead."""
    low, high = ends
    inner = []
    if low is not None and high is not None:
        a, b = (panel.px(min(max(v, panel.x.low), panel.x.high)) for v in (low, high))
        inner.append(f'<path class="wh" d="M{n(a)} {n(y)}H{n(b)}"/>')
        for outside, x, step in ((low < panel.x.low, a, 4), (high > panel.x.high, b, -4)):
            if outside:
                path = f"M{n(x + step)} {n(y - 3)}L{n(x)} {n(y)}L{n(x + step)} {n(y + 3)}"
                inner.append(f'<path class="wh" d="{path}"/>')
    inner.append(marker(index, panel.px(middle), y, 3.6, hollow=after))
    panel.add(f'<g class="{color(index)}">{"".join(inner)}</g>')


def label(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    """Return a text element of the CSS class `kind`."""
    return (
        f'<text class="{kind}" x="{n(x)}" y="{n(y)}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def cut(text: str, room: float, size: float, letter: float = LETTER) -> str:
    """Shorten a text to a width by removing its middle, as names often differ at their ends."""
    most = max(int(room / (letter * size)), 3)
    if len(text) <= most:
        return text
    tail = (most - 1) // 3
    return f"{text[: most - 1 - tail].rstrip()}…{text[len(text) - tail :]}"


def linear_axis(low: float, high: float, count: int = 5, label: str = "") -> Axis:
    """Return an axis with round ticks that covers a range and ends at ticks."""
    if high <= low:
        low, high = low - 1, high + 1
    step = _step((high - low) / max(count - 1, 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [(i * step, tick(i * step, step)) for i in range(first, last + 1)]
    return Axis(ticks[0][0], ticks[-1][0], ticks, label)


def inner_axis(low: float, high: float, count: int = 5, label: str = "") -> Axis:
    """Return an axis of exactly a range, with round ticks inside."""
    step = _step((high - low) / max(count - 1, 1))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return Axis(low, high, [(i * step, tick(i * step, step)) for i in numbers], label)


def log_axis(values: Sequence[float], label: str = "") -> Axis:
    """Return a logarithmic axis of full decades that covers values above 0."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    every = max(1, math.ceil((high - low) / 5))
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    ticks = [(10.0**i, f"10{str(i).translate(raised)}") for i in range(low, high + 1, every)]
    return Axis(10.0**low, 10.0**high, ticks, label, log=True)


def counted_axis(count: int, label: str = "") -> Axis:
    """Return an axis of the integers 1 to `count`."""
    if count < 2:
        return Axis(0, 2, [(1, "1")], label)
    step = max(1, math.ceil(_step((count - 1) / 5)))
    first = 1 if step == 1 else step
    return Axis(1, count, [(v, str(v)) for v in range(first, count + 1, step)], label)


def tick(value: float, step: float) -> str:
    """Format a tick with the number of decimals of the step."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    if round(step, digits) != step and digits < 6:  # a quarter
        digits += 1
    text = f"{value:.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def n(value: float) -> str:
    """Format a length with at most one decimal."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next((k * power for k in (1, 2, 2.5, 5) if k * power >= rough * 0.999), 10 * power)
