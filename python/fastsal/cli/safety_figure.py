"""Figure of a sparsity limit: predicted and measured increase of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsal.utils.atomic import atomic_path

if TYPE_CHECKING:
    from fastsal.pruning.limits.limit import SafetyReport

# Okabe and Ito's palette, safe for color-vision deficiency; line styles repeat the distinction.
_MEASURED, _PREDICTED, _SAFE = "#0072B2", "#D55E00", "#009E73"
_INK, _FAINT = "#222222", "#8a8a8a"


def draw(report: SafetyReport, path: Path) -> Path:
    """Draw the curve of a sparsity limit as an SVG file and return its path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    limit = report.limit
    style: Any = {"font.size": 11, "font.family": "sans-serif", "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(8.0, 6.4), facecolor="white")
        FigureCanvasSVG(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        figure.subplots_adjust(left=0.11, right=0.97, top=0.9, bottom=0.1, hspace=0.28)
        _losses(above, report)
        _limit(below, report)
        for axes in (above, below):
            axes.axvspan(0, 100 * report.sparsity, color=_SAFE, alpha=0.1, linewidth=0)
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelcolor=_INK)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        below.set_xlabel("weights pruned, %")
        figure.text(
            0.11, 0.955,
            f"Safe up to {100 * report.sparsity:g} % (shaded): confidence "
            f"{limit.confidence:g}, {report.images:,} held-out images",
            fontsize=12, fontweight="bold", color=_INK,
        )  # fmt: skip
        description = "Loss increase and limit over sparsity of a pruned model"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Description": description})
    return path


def _losses(axes: Any, report: SafetyReport) -> None:
    """Draw the predicted and the measured increase of the loss."""
    curve = report.curve
    x = [100 * point["sparsity"] for point in curve]
    axes.errorbar(
        x,
        [point["loss_increase"] for point in curve],
        yerr=[2 * point["loss_error"] for point in curve],
        color=_MEASURED, marker="o", markersize=5, capsize=3, linewidth=2,
        label="measured, ± 2 standard errors",
    )  # fmt: skip
    predicted = [point["predicted"] for point in curve]
    if None not in predicted:
        axes.plot(
            x, predicted,
            color=_PREDICTED, marker="^", markersize=5, linewidth=2, linestyle=(0, (4, 2)),
            label="predicted, δᵀAδ / 2",
        )  # fmt: skip
    if report.trusted_until is not None:
        at = 100 * report.trusted_until
        axes.axvline(
            at, color=_FAINT, linewidth=1.2, linestyle=(0, (1, 2)),
            label=f"agree, within the error, up to {at:g} %",
        )  # fmt: skip
    axes.set_title("Increase of the mean loss", loc="left", fontsize=11, color=_INK)
    axes.legend(frameon=False, loc="upper left")


def _limit(axes: Any, report: SafetyReport) -> None:
    """Draw the limited quantity, its confidence bound, and the limit."""
    curve, limit = report.curve, report.limit
    x = [100 * point["sparsity"] for point in curve]
    what = "Drop of top-1 accuracy"
    if limit.kind == "loss":
        what = "Increase of the capped loss"
    if report.capped_at is not None:
        what = f"Increase of the mean loss, capped at {report.capped_at:.4g}"
    axes.fill_between(
        x,
        [point["increase"] for point in curve],
        [point["upper"] for point in curve],
        color=_MEASURED, alpha=0.18, linewidth=0, label=f"up to its bound at {limit.confidence:g}",
    )  # fmt: skip
    axes.plot(
        x, [point["increase"] for point in curve],
        color=_MEASURED, marker="o", markersize=5, linewidth=2, label="measured",
    )  # fmt: skip
    axes.axhline(limit.most, color=_INK, linewidth=1.2, label=f"limit {limit.most:g}")
    axes.set_ylim(top=max(3 * limit.most, min(max(p["upper"] for p in curve), 6 * limit.most)))
    axes.set_title(what, loc="left", fontsize=11, color=_INK)
    axes.legend(frameon=False, loc="upper left")
