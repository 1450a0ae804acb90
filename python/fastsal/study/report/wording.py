"""Numbers and sentences of a report, the same in HTML and in Markdown. Plain text, not escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastsal.study.report.findings import HELD, NOT_HELD, OPEN, UNKNOWN, Finding, Section, pooled
from fastsal.study.report.intervals import Interval
from fastsal.study.report.results import SOURCE, TRANSFER, Results, in_order

PAPER = "A Second-Order Perspective on Pruning at Initialization and Knowledge Transfer"
PAPER_URL = "https://arxiv.org/abs/2509.24066"
NONE = "–"


def points(value: float | None) -> str:
    """Write a difference in points with its sign and two decimals."""
    if value is None:
        return NONE
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def bounds(interval: Interval | None) -> str:
    """Write a difference and its interval: `−0.40 [−0.90, +0.10]`."""
    if interval is None:
        return NONE
    if interval.low is None:
        return points(interval.mean)
    return f"{points(interval.mean)} [{points(interval.low)}, {points(interval.high)}]"


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share, 0 to 1, in per cent."""
    return NONE if share is None else f"{100 * share:.{digits}f}"


def sparsity(share: float) -> str:
    """Write a sparsity: `90 %`, `97.5 %`, not broken before the sign."""
    return f"{100 * share:.6g}\u00a0%"


def short(value: float | None) -> str:
    """Write a number with three digits, a large one in full."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}".replace("-", "−")


def size(count: float | None) -> str:
    """Write a number of bytes in KiB, MiB or GiB, three digits."""
    if not count:
        return NONE if count is None else "0"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 2**10:.3g} KiB"


def number(count: int, one: str, many: str | None = None) -> str:
    """Write a count and its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listing(names: Sequence[str], most: int = 8) -> str:
    """Write names in a sentence; a long list is cut and says so."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def what_was_done(results: Results, parts: Sequence[Section]) -> str:
    """Say in one sentence what the study did, from its rows."""
    if not parts:
        return f"No cell of the study came to its end; {number(len(results.failures), 'failed')}."
    rows = results.rows
    models = []
    for name in in_order(r.model for r in rows):
        known = results.prunable(name)
        models.append(f"{name} ({known:,} prunable weights)" if known else name)
    levels = sorted({r.sparsity for r in rows})
    span = sparsity(levels[0])
    if len(levels) > 1:
        span = f"{len(levels)} sparsities from {span} to {sparsity(levels[-1])}"
    criteria = number(len({r.criterion for r in rows}), "criterion", "criteria")
    rounds = sorted({r.rounds for r in rows})
    if len(rounds) > 1:
        criteria += f", in {listing([str(r) for r in rounds])} rounds,"
    seeds = len({r.seed for r in rows})
    sources = in_order(p.source for p in parts)
    transfer = in_order(r.task for r in rows if r.role == TRANSFER)
    own = in_order(r.task for r in rows if r.role == SOURCE)
    tuned = any(p.p2 for p in parts)
    text = (
        f"{listing(models)} {'was' if len(models) == 1 else 'were'} pruned to {span} by "
        f"{criteria} that saw images of {listing(sources)} alone ({number(seeds, 'seed')}), "
        "and top-1 accuracy was measured on "
    )
    if len(sources) == 1:
        text += f"{listing(own)} and on {number(len(transfer), 'task')} that pruning never saw"
        text += f" ({listing(transfer)})" if transfer else ""
    else:
        text += f"{number(len(set(own) | set(transfer)), 'task')}, the source's and the others"
    stage = "before and after fine-tuning on the source" if tuned else "without any training after"
    return f"{text}, {stage}."


def limit(margin: float) -> str:
    """Write the least change that counts as kept."""
    return f"−{margin:g} {'point' if margin == 1 else 'points'}" if margin else "0"


def rule(margin: float, tuned: bool) -> list[str]:
    """Say exactly when a prediction counts as held."""
    lines = [
        "A difference is taken within a seed, between accuracies on the same test images; transfer "
        "is the mean over the tasks that pruning never saw. Over seeds: mean and 95 % Student "
        "t-interval (n − 1 degrees of freedom), each interval by itself, with no correction for "
        "their number.",
        f"P1 (pruned − dense): a side is kept where its whole interval is at or above "
        f"{limit(margin)}, dropped where it is not kept and the whole interval is below 0, "
        "otherwise open. P1 held where source and transfer are kept, and did not hold where either "
        "dropped.",
    ]
    if tuned:
        lines.append(
            "P2 (fine-tuned − pruned): the source is raised where its whole interval is above 0, "
            "not raised where it is at or below 0, otherwise open. Transfer is raised where its "
            f"whole interval is above 0, not lowered where it is at or above {limit(margin)}, "
            "lowered where it is neither and the whole interval is below 0, otherwise open. P2 "
            "held where the source is raised and transfer not lowered (or raised); it did not hold "
            "where the source is not raised or transfer is lowered."
        )
    lines.append(
        "One seed gives no interval, and no verdict. Intervals cover the draw of calibration "
        "images and the order of training; they do not cover the draw of test images, which are "
        "the same throughout. An interval of no width: every seed came to the same number."
    )
    return lines


def brief_rule(margin: float, tuned: bool) -> str:
    """Say in short what the verdicts mean."""
    text = (
        f"In brackets: 95 % t-intervals over seeds. P1 held: the intervals of source and of "
        f"transfer are both at or above {limit(margin)}."
    )
    if tuned:
        text += (
            " P2 held: the interval of the source is above 0, that of transfer at or above "
            f"{limit(margin)}."
        )
    return f"{text} Open: the interval allows both answers."


def seed_note(part: Section) -> str:
    """Say what it means for intervals that there are one or two seeds; empty with more."""
    text = number(len(part.seeds), "seed")
    if len(part.seeds) == 1:
        return f"{text}: numbers come without an interval, and nothing can be called held."
    if len(part.seeds) == 2:
        return f"{text}: t-intervals are 12.7 standard errors wide; figures show the range instead."
    return ""


def count_sentence(found: Sequence[Finding], name: str) -> str:
    """Say in how many points of the grid a prediction held, was open, did not hold."""
    counts = Counter(f.verdict for f in found)
    total = len(found)
    if counts[UNKNOWN] == total:
        return f"{name}: one seed, no interval, no verdict."
    parts = [f"held at {counts[HELD]} of {number(total, 'point')} of the grid"]
    parts += [f"{text} at {counts[v]}" for v, text in ((NOT_HELD, NOT_HELD), (OPEN, "is open"))
              if counts[v]]  # fmt: skip
    rest = total - counts[HELD] - counts[NOT_HELD] - counts[OPEN]
    if rest:
        parts.append(f"has no verdict at {rest}")
    return f"{name} {', '.join(parts)} (criterion × sparsity)."


def change_text(finding: Finding) -> str:
    """Write a change: method, source and transfer with their intervals."""
    c = finding.change
    return f"{c.method.label} (source {bounds(c.source)}, transfer {bounds(c.transfer)} points)"


def pruning_sentence(part: Section) -> str:
    """Say how far P1 reached; where it held nowhere, where it came nearest."""
    held = [f for f in part.p1 if f.verdict == HELD]
    if held:
        top = max(f.change.sparsity for f in held)
        best = [change_text(f) for f in held if f.change.sparsity == top]
        return f"Highest sparsity at which P1 held: {sparsity(top)}, with {listing(best, 3)}."
    sized = [(min(i.mean for i in (f.change.source, f.change.transfer) if i), f) for f in part.p1]
    if not sized:
        return ""
    nearest = max(sized, key=lambda pair: pair[0])[1]
    return f"Smallest drop: at {sparsity(nearest.change.sparsity)}, {change_text(nearest)}."


def pooled_sentence(found: Sequence[Finding], what: str) -> str:
    """Say the mean change over the whole grid."""
    count, source, transfer = pooled(found)
    seeds = max((i.n for i in (source, transfer) if i is not None), default=0)
    return (
        f"{what}, mean over {number(count, 'point')} of the grid: source {bounds(source)}, "
        f"transfer {bounds(transfer)} points ({number(seeds, 'seed')})."
    )


def findings_of(part: Section) -> list[str]:
    """Return the measured findings of one model and source, the first ones first."""
    lines = []
    if part.p1:
        lines.append(count_sentence(part.p1, "P1"))
        lines.append(pruning_sentence(part))
    if part.p2:
        lines.append(count_sentence(part.p2, "P2"))
        lines.append(pooled_sentence(part.p2, "Fine-tuning on the source"))
    if part.control is not None:
        lines.append(
            f"For comparison, fine-tuning the dense model: source {bounds(part.control.source)}, "
            f"transfer {bounds(part.control.transfer)} points."
        )
    if part.p1 and not part.p2:
        lines.append("P2: not measured, the study has no fine-tuning.")
    return [line for line in lines if line]
