"""Figure of the demo: accuracy over sparsity on source and unseen digits."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsal.utils.atomic import atomic_path

if TYPE_CHECKING:
    from fastsal.cli.demo.study import DemoResult

# Okabe and Ito's palette, safe for color-vision deficiency; markers repeat the distinction.
_STYLES = (
    ("#CC79A7", "s"),
    ("#E69F00", "^"),
    ("#0072B2", "o"),
    ("#56B4E9", "v"),
    ("#009E73", "D"),
)
_INK, _FAINT = "#222222", "#8a8a8a"


def draw(found: DemoResult, folder: Path) -> list[Path]:
    """Draw `demo.png` and `demo.svg` in `folder` and return their paths."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 11, "font.family": "sans-serif", "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(11.5, 5.6), facecolor="white")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(left=0.065, right=0.85, top=0.83, bottom=0.25, wspace=0.08)
        _panel(left, found, "source", "Digits 0–4: pruned on these", label=False)
        _panel(right, found, "unseen", "Digits 5–9: unseen by pruning", label=True)
        left.set_ylabel("top-1 accuracy, %")
        figure.text(
            0.065, 0.94, "Accuracy after pruning, without any training",
            fontsize=15, fontweight="bold", color=_INK,
        )  # fmt: skip
        caption = textwrap.fill(_caption(found), 158)
        figure.text(
            0.065, 0.025, caption, fontsize=9, color="#555555", va="bottom", linespacing=1.4
        )
        paths = []
        for name in ("demo.png", "demo.svg"):
            with atomic_path(folder / name) as temporary:
                figure.savefig(temporary, dpi=160)
            paths.append(folder / name)
    return paths


def _panel(axes: Any, found: DemoResult, task: str, title: str, *, label: bool) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=_INK, pad=10)
    dense = 100 * getattr(found.dense, task)
    axes.axhline(dense, color=_INK, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    axes.axhline(20, color=_FAINT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    last = 100 * max(found.settings.sparsities)
    axes.text(last, dense + 1.5, f"dense {dense:.1f}", color=_INK, fontsize=10, ha="right")
    axes.text(0, 20 - 1.2, "chance", color=_FAINT, fontsize=10, va="top")
    ends = []
    for method, (color, marker) in zip(found.settings.methods, _STYLES, strict=False):
        points = [point for point in found.points if point.method == method.label]
        x = [0.0, *(100 * point.sparsity for point in points)]
        y = [dense, *(100 * getattr(point, task) for point in points)]
        axes.plot(
            x, y, color=color, marker=marker, markersize=6, linewidth=2.2,
            markeredgecolor="white", markeredgewidth=0.8, zorder=3, clip_on=False,
        )  # fmt: skip
        ends.append((y[-1], method.label, color))
    if label:
        texts = [text.replace(" + ", "\n+ ") for _, text, _ in ends]
        heights = [6.0 * (1 + text.count("\n")) for text in texts]
        places = spread([y for y, _, _ in ends], heights, low=3.0, high=103.0)
        for place, text, (y, _, color) in zip(places, texts, ends, strict=True):
            axes.plot(
                [last * 1.02, last * 1.055], [y, place],
                color=color, linewidth=0.9, clip_on=False,
            )  # fmt: skip
            axes.text(
                last * 1.065, place, text,
                color=color, fontsize=11, fontweight="bold", va="center", linespacing=1.15,
            )  # fmt: skip
    axes.set_xlim(-1.5, last * 1.02)
    axes.set_ylim(0, 107)
    axes.set_xticks([0, *(100 * s for s in found.settings.sparsities)])
    axes.set_xlabel("weights pruned, %")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def spread(
    values: Sequence[float], heights: Sequence[float], *, low: float, high: float
) -> list[float]:
    """Move labels vertically until none overlaps another.

    Args:
        values: preferred center of each label.
        heights: height of each label, in the same unit.
        low: smallest center.
        high: largest center.

    Returns:
        New centers, in the same order from low to high.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [min(max(values[i], low), high) for i in order]
    for _ in range(500):
        for a, b in itertools.pairwise(range(len(order))):
            gap = (heights[order[a]] + heights[order[b]]) / 2
            push = gap - (places[b] - places[a])
            if push > 1e-9:
                places[a] -= push / 2
                places[b] += push / 2
        places = [min(max(place, low), high) for place in places]
    return [place for _, place in sorted(zip(order, places, strict=True))]


def _caption(found: DemoResult) -> str:
    images = found.images
    settings = found.settings
    return (
        f"EfficientNet-Lite0 (ImageNet weights, {found.weights / 1e6:.2f} million prunable), "
        f"scikit-learn's 8×8 digits at {settings.size}×{settings.size} pixels. Scores: "
        f"{images['prune, 0-4']} images of digits 0–4, one collection for all criteria, "
        f"blocks of {settings.block_size}, damping {settings.damping:g} of the mean diagonal, "
        "one global threshold. Kept weights are updated only where a label says compensation. "
        "Heads: ridge regression on dense features, then frozen "
        f"({images['head, 0-4']} and {images['head, 5-9']} images). Accuracy: "
        f"{images['test, 0-4']} and {images['test, 5-9']} other images; nothing is trained or "
        "recalibrated after pruning."
    )
