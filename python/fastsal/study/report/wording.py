"""Numbers and sentences of a report, shared by HTML and Markdown; plain text, not escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastsal.study.folder_format import SOURCE, TRANSFER
from fastsal.study.report.findings import HELD, NOT_HELD, OPEN, UNKNOWN, Finding, Section, pooled
from fastsal.study.report.intervals import Interval
from fastsal.study.report.results import Results, in_order

PAPER = "A Second-Order Perspective on Pruning at Initialization and Knowledge Transfer"
PAPER_URL = "https://arxiv.org/abs/2509.24066"
NONE = "–"
# The predictions in full, and in short.
CLAIMS = {
    "P1": "pruning on the source preserves accuracy on the source and on unseen tasks",
    "P2": "fine-tuning on the source raises accuracy on the source and does not lower it on unseen "
    "tasks",
}
SHORT_CLAIMS = {"P1": "pruning preserves accuracy", "P2": "fine-tuning raises accuracy"}


def points(value: float | None) -> str:
    """Format a difference in percentage points, with sign and two decimals."""
    if value is None:
        return NONE
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def bounds(interval: Interval | None) -> str:
    """Format a difference with its interval, as in `−0.40 [−0.90, +0.10]`."""
    if interval is None:
        return NONE
    if interval.low is None:
        return points(interval.mean)
    return f"{points(interval.mean)} [{points(interval.low)}, {points(interval.high)}]"


def percent(share: float | None, digits: int = 1) -> str:
    """Format a fraction, 0 to 1, in percent without the sign."""
    return NONE if share is None else f"{100 * share:.{digits}f}"


def sparsity(share: float) -> str:
    """Format a sparsity, 0 to 1, as in `90%` and `97.5%`."""
    return f"{100 * share:.6g}%"


def short(value: float | None) -> str:
    """Format a number with three digits, or without decimals from 100."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}".replace("-", "−")


def size(count: float | None) -> str:
    """Format a number of bytes in KiB, MiB or GiB, with three digits."""
    if not count:
        return NONE if count is None else "0"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 2**10:.3g} KiB"


def number(count: int, one: str, many: str | None = None) -> str:
    """Format a count with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listing(names: Sequence[str], most: int = 8) -> str:
    """Join names for a sentence; a long list is shortened."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def what_was_done(results: Results, sections: Sequence[Section]) -> str:
    """Describe what the study did, from its rows."""
    if not sections:
        return f"No cell of the study finished; {number(len(results.failures), 'cell')} failed."
    rows = results.rows
    models = []
    for name in in_order(r.model for r in rows):
        known = results.prunable(name)
        models.append(f"{name} ({known:,} prunable weights)" if known else name)
    levels = sorted({r.sparsity for r in rows})
    span = f"{sparsity(levels[0])} sparsity"
    if len(levels) > 1:
        span = f"{len(levels)} sparsities from {sparsity(levels[0])} to {sparsity(levels[-1])}"
    criteria = number(len({r.criterion for r in rows}), "criterion", "criteria")
    rounds = sorted({r.rounds for r in rows})
    if len(rounds) > 1:
        criteria += f" in {listing([str(r) for r in rounds])} rounds"
    seeds = len({r.seed for r in rows})
    sources = in_order(s.source for s in sections)
    transfer = in_order(r.task for r in rows if r.role == TRANSFER)
    own = in_order(r.task for r in rows if r.role == SOURCE)
    tuned = any(s.p2 for s in sections)
    images = f"images of {sources[0]} only"
    if len(sources) > 1:
        images = f"images of one of {len(sources)} sources ({listing(sources)})"
    if len(sources) > 1:
        tasks = number(len({*own, *transfer}), "task")
    elif transfer:
        unseen = number(len(transfer), "unseen task")
        tasks = f"the source ({listing(own)}) and {unseen} ({listing(transfer)})"
    else:
        tasks = f"the source ({listing(own)})"
    stage = "before and after fine-tuning on the source" if tuned else "without fine-tuning"
    return (
        f"{listing(models)} {'was' if len(models) == 1 else 'were'} pruned to {span} with "
        f"{criteria}, using {images}, with {number(seeds, 'seed')}. Top-1 accuracy was measured "
        f"on {tasks}, {stage}."
    )


def limit(margin: float) -> str:
    """Format the smallest change that counts as kept."""
    return f"−{margin:g} {'point' if margin == 1 else 'points'}" if margin else "0"


def rule(margin: float, tuned: bool) -> list[str]:
    """Return the decision rule of the predictions, one paragraph per item."""
    lines = [
        "Differences are taken within a seed, between accuracies on the same test images. Source "
        "is the mean over the tasks of the source, transfer the mean over unseen tasks. Means and "
        "95% Student t-intervals (n − 1 degrees of freedom) are over seeds. The intervals are not "
        "corrected for multiple comparisons.",
        "P1 (pruned − dense): source or transfer is kept if its whole interval is at or above "
        f"{limit(margin)}, dropped if it is not kept and its whole interval is below 0, and "
        "inconclusive otherwise. P1 held if both are kept, and did not hold if either is dropped.",
    ]
    if tuned:
        lines.append(
            "P2 (fine-tuned − pruned): the source is raised if its whole interval is above 0, not "
            "raised if its whole interval is at or below 0, and inconclusive otherwise. Transfer "
            "is raised if its whole interval is above 0, not lowered if it is at or above "
            f"{limit(margin)}, lowered if it is neither and its whole interval is below 0, and "
            "inconclusive otherwise. P2 held if the source is raised and transfer is raised or not "
            "lowered; it did not hold if the source is not raised or transfer is lowered."
        )
    lines.append(
        "A single seed gives no interval and no verdict. Intervals cover the draw of calibration "
        "images and the order of training, not the draw of test images, which are the same for all "
        "seeds. An interval of zero width means that all seeds gave the same value."
    )
    return lines


def brief_rule(margin: float, tuned: bool) -> str:
    """Return a short version of the decision rule."""
    text = (
        "Brackets: 95% t-intervals over seeds. P1 held: the intervals of source and transfer are "
        f"at or above {limit(margin)}."
    )
    if tuned:
        text += (
            " P2 held: the interval of the source is above 0, and that of transfer is at or above "
            f"{limit(margin)}."
        )
    return f"{text} Inconclusive: the interval allows either answer."


def seed_note(section: Section) -> str:
    """Explain the intervals of one or two seeds; empty with more seeds."""
    text = number(len(section.seeds), "seed")
    if len(section.seeds) == 1:
        return f"{text}: values have no interval, and predictions have no verdict."
    if len(section.seeds) == 2:
        return (
            f"{text}: t-intervals extend 12.7 standard errors to each side; figures show the range "
            "instead."
        )
    return ""


def count_sentence(found: Sequence[Finding], name: str) -> str:
    """Count the combinations in which a prediction held, did not hold or is inconclusive."""
    counts = Counter(f.verdict for f in found)
    total = len(found)
    if counts[UNKNOWN] == total:
        return f"{name}: no verdict, as there is only one seed."
    clauses = [f"held at {counts[HELD]} of {number(total, 'combination')} (criterion × sparsity)"]
    clauses += [f"{verdict} at {counts[verdict]}" for verdict in (NOT_HELD, OPEN)
                if counts[verdict]]  # fmt: skip
    rest = total - counts[HELD] - counts[NOT_HELD] - counts[OPEN]
    if rest:
        clauses.append(f"no verdict at {rest}")
    return f"{name} ({SHORT_CLAIMS[name]}): {', '.join(clauses)}."


def change_text(finding: Finding) -> str:
    """Format a change: variant, source and transfer with their intervals."""
    c = finding.change
    return f"{c.variant.label} (source {bounds(c.source)}, transfer {bounds(c.transfer)} points)"


def pruning_sentence(section: Section) -> str:
    """Name the highest sparsity at which P1 held, or else the smallest drop."""
    held = [f for f in section.p1 if f.verdict == HELD]
    if held:
        top = max(f.change.sparsity for f in held)
        best = [change_text(f) for f in held if f.change.sparsity == top]
        return f"Highest sparsity at which P1 held: {sparsity(top)}, with {listing(best, 3)}."
    sized = [
        (min(i.mean for i in (f.change.source, f.change.transfer) if i), f) for f in section.p1
    ]
    if not sized:
        return ""
    nearest = max(sized, key=lambda pair: pair[0])[1]
    return (
        f"Smallest accuracy drop, at {sparsity(nearest.change.sparsity)}: {change_text(nearest)}."
    )


def pooled_sentence(found: Sequence[Finding], what: str) -> str:
    """Describe the mean change over the grid."""
    count, source, transfer = pooled(found)
    seeds = max((i.n for i in (source, transfer) if i is not None), default=0)
    return (
        f"{what}, mean over {number(count, 'combination')}: source {bounds(source)}, "
        f"transfer {bounds(transfer)} points ({number(seeds, 'seed')})."
    )


def findings_of(section: Section) -> list[str]:
    """Return the findings on one model and source as sentences."""
    lines = []
    if section.p1:
        lines.append(count_sentence(section.p1, "P1"))
        lines.append(pruning_sentence(section))
    if section.p2:
        lines.append(count_sentence(section.p2, "P2"))
        lines.append(pooled_sentence(section.p2, "Change by fine-tuning on the source"))
    if section.control is not None:
        lines.append(
            f"Change by fine-tuning the dense model: source {bounds(section.control.source)}, "
            f"transfer {bounds(section.control.transfer)} points."
        )
    if section.p1 and not section.p2:
        lines.append("P2: not measured; the study has no fine-tuning.")
    return [line for line in lines if line]
