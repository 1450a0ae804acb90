"""Draw changes of accuracy with their intervals, one panel per sparsity."""

from __future__ import annotations

from collections.abc import Sequence

from fastsal.study.report import wording
from fastsal.study.report.chart import (
    LETTER,
    Axis,
    Ids,
    Panel,
    cut,
    inner_axis,
    label,
    svg,
    whisker,
)
from fastsal.study.report.findings import Finding, Section
from fastsal.study.report.intervals import Interval


def forest(
    section: Section, found: Sequence[Finding], what: str, margin: float, ids: Ids
) -> list[str]:
    """Draw changes of source and transfer with their intervals, one panel per sparsity."""
    drawn = []
    for sparsity in section.sparsities:
        here = [f for f in found if f.change.sparsity == sparsity]
        if here:
            drawn.append(_panel(sparsity, here, what, margin, ids))
    return drawn


def _panel(sparsity: float, found: Sequence[Finding], what: str, margin: float, ids: Ids) -> str:
    intervals = [i for f in found for i in (f.change.source, f.change.transfer) if i is not None]
    low, high = _range(intervals, margin)
    row = 30.0
    longest = max(len(f.change.variant.label) for f in found)
    left = min(max(LETTER * 11 * longest + 14, 56.0), 140.0)
    panel = Panel(
        wording.sparsity(sparsity) + " pruned",
        inner_axis(low, high, 5, f"{what}, points"),
        Axis(0, 1, []),
        height=30 + row * len(found) + 44,
        left=left,
    )
    top, bottom = panel.top - 4, panel.height - panel.bottom
    for value, _ in panel.x.ticks:
        panel.add(f'<path class="gr" d="M{panel.px(value):.1f} {top}V{bottom}"/>')
    a, b = panel.px(max(-margin, low)), panel.px(0)
    panel.add(f'<rect class="zone" x="{a:.1f}" y="{top}" width="{b - a:.1f}" '
              f'height="{bottom - top}"/>')  # fmt: skip
    panel.add(f'<path class="zero" d="M{b:.1f} {top}V{bottom}"/>')
    texts = []
    for i, f in enumerate(found):
        variant, y = f.change.variant, panel.top + row * i + row / 2
        panel.add(label(2, y + 3.5, cut(variant.label, left - 10, 11), "start", "nm"))
        for interval, step, hollow in ((f.change.source, -5, False), (f.change.transfer, 6, True)):
            if interval is not None:
                whisker(panel, variant.index, y + step, interval.mean,
                        (interval.low, interval.high), hollow)  # fmt: skip
        texts.append(f"{variant.label}: source {wording.bounds(f.change.source)}, "
                     f"transfer {wording.bounds(f.change.transfer)}")  # fmt: skip
    return svg(panel, ". ".join(texts) + ".", ids)


def _range(intervals: Sequence[Interval], margin: float) -> tuple[float, float]:
    """Return a range that covers every mean; whiskers much longer than the others are cut."""
    means = [i.mean for i in intervals]
    halves = sorted(i.high - i.mean for i in intervals if i.high is not None)
    reach = halves[(3 * (len(halves) - 1)) // 4] if halves else 0.0
    low, high = min([*means, -margin]) - reach, max([*means, 0.0]) + reach
    pad = 0.06 * (high - low)
    return low - pad, high + pad
