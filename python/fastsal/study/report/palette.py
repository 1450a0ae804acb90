"""Colors and marks of variants, distinguishable with any color vision, in light and dark mode.

The colors follow Okabe and Ito, darkened or lightened to a contrast of at least 3:1 with the
background; each variant also has a mark of its own.
"""

from __future__ import annotations

LIGHT = {
    "bg": "#ffffff", "panel": "#f6f7f8", "ink": "#1b1f23", "muted": "#57606a", "line": "#d0d7de",
    "grid": "#e7eaed", "link": "#0757a3", "good": "#0b6b3a", "bad": "#a8320a", "open": "#57606a",
    "c0": "#0065a8", "c1": "#c74e00", "c2": "#00805c", "c3": "#a8508a", "c4": "#8a6400",
    "c5": "#5b4bb5", "c6": "#555c63", "c7": "#1787b8", "c8": "#8c4a2f", "c9": "#647500",
}  # fmt: skip
DARK = {
    "bg": "#0f1215", "panel": "#181c20", "ink": "#e6e9ec", "muted": "#a3acb5", "line": "#353c44",
    "grid": "#262c32", "link": "#79bbff", "good": "#5fd393", "bad": "#ff9a70", "open": "#a3acb5",
    "c0": "#5db7f5", "c1": "#ff8c42", "c2": "#2fcb9b", "c3": "#e893c8", "c4": "#e3b341",
    "c5": "#a99cff", "c6": "#b8c0c8", "c7": "#8be0ff", "c8": "#d79a78", "c9": "#bccf45",
}  # fmt: skip
COLORS = 10
MARKS = (
    "circle", "square", "triangle", "diamond", "down", "plus", "cross", "hexagon", "hourglass",
    "star",
)  # fmt: skip


def color(index: int) -> str:
    """Return the CSS class of the color of a variant."""
    return f"c{index % COLORS}"


def mark(index: int) -> str:
    """Return the mark of a variant; variants of one color have different marks."""
    return MARKS[(index + index // COLORS) % len(MARKS)]


def concrete(css: str, colors: dict[str, str]) -> str:
    """Replace `var(--name)` by colors, for SVG renderers without support for variables."""
    for name, value in colors.items():
        css = css.replace(f"var(--{name})", value)
    return css
