"""Verdicts on the predictions P1 and P2, from accuracy differences and their intervals.

The predictions are from "A Second-Order Perspective on Pruning at Initialization and Knowledge
Transfer" (arXiv 2509.24066). P1: pruning on a source preserves accuracy on the source and on unseen
tasks. P2: fine-tuning the pruned backbone on the source raises accuracy on the source and does not
lower it on unseen tasks.

Differences are taken within a seed: source is the mean over the tasks of the source, transfer the
mean over the tasks that pruning does not see. Means and t-intervals are over seeds. Units:
percentage points of top-1 accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fastsal.study.folder_format import SOURCE, TRANSFER
from fastsal.study.report.intervals import Interval, mean, t_interval
from fastsal.study.report.results import Results, Row, Variant, in_order

MARGIN = 1.0  # points

HELD, NOT_HELD, OPEN = "held", "did not hold", "inconclusive"
UNKNOWN, ABSENT = "no interval", "not measured"
KEPT, DROPPED = "kept", "dropped"
RAISED, NOT_RAISED = "raised", "not raised"
NOT_LOWERED, LOWERED = "not lowered", "lowered"

Difference = Callable[[Row], "float | None"]


@dataclass(frozen=True)
class Change:
    """Changes of accuracy for one variant and sparsity, in percentage points.

    Attributes:
        variant: Criterion and number of rounds.
        sparsity: Requested sparsity.
        source: Mean over the tasks of the source; None if not measured.
        transfer: Mean over the tasks that pruning does not see; None if not measured.
        gap: Transfer minus source; None unless both are measured.
        worst: Transfer task with the lowest mean change, and that mean.
        per_seed: `{seed: (source, transfer)}`.
    """

    variant: Variant
    sparsity: float
    source: Interval | None
    transfer: Interval | None
    gap: Interval | None
    worst: tuple[str, float] | None
    per_seed: dict[int, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Finding:
    """A change with its verdicts on the source, on transfer and on the prediction."""

    change: Change
    source: str
    transfer: str
    verdict: str


@dataclass(frozen=True)
class Section:
    """Results of one model pruned on one source.

    Attributes:
        model: Name of the model.
        source: Name of the source.
        rows: Rows of finished cells.
        variants: Variants that have rows, in the order of the study.
        sparsities: Sparsities, in increasing order.
        seeds: Seeds, in increasing order.
        tasks: `(task, role)`, those of the source first.
        p1: Findings on pruned minus dense, by variant and sparsity.
        p2: Findings on fine-tuned minus pruned; empty without fine-tuning.
        control: Change by fine-tuning the dense model, at sparsity 0; None without such a cell.
    """

    model: str
    source: str
    rows: list[Row]
    variants: list[Variant]
    sparsities: list[float]
    seeds: list[int]
    tasks: list[tuple[str, str]]
    p1: list[Finding]
    p2: list[Finding]
    control: Change | None = None
    _by_point: dict[tuple[str, int, float], list[Row]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        for row in sorted(self.rows, key=lambda row: row.seed):
            key = (row.criterion, row.rounds, row.sparsity)
            self._by_point.setdefault(key, []).append(row)

    @property
    def pruned_at(self) -> list[float]:
        """The sparsities above 0, for which predictions are judged."""
        return [s for s in self.sparsities if s > 0]

    def select(self, variant: Variant, sparsity: float, task: str | None = None) -> list[Row]:
        """Return the rows of a variant at a sparsity, for one task or for all, ordered by seed."""
        found = self._by_point.get((variant.criterion, variant.rounds, sparsity), [])
        return [row for row in found if task is None or row.task == task]


def sections(results: Results, margin: float = MARGIN) -> list[Section]:
    """Group results by model and source, and judge both predictions in each group.

    Args:
        results: Results of the study.
        margin: Loss in percentage points that still counts as kept.
    """
    return [
        _section(results, model, source, margin)
        for model, source in in_order((row.model, row.source) for row in results.rows)
    ]


def judge_pruning(change: Change, margin: float) -> Finding:
    """Judge P1: kept if the whole interval is at or above -margin, dropped if it is below 0."""
    source = _loss_verdict(change.source, margin, KEPT, DROPPED)
    transfer = _loss_verdict(change.transfer, margin, KEPT, DROPPED)
    return Finding(change, source, transfer, _both((source, transfer), {KEPT}, {DROPPED}))


def judge_tuning(change: Change, margin: float) -> Finding:
    """Judge P2: source raised if its whole interval is above 0, transfer judged as in P1."""
    source = _gain_verdict(change.source)
    transfer = _loss_verdict(change.transfer, margin, NOT_LOWERED, LOWERED)
    if change.transfer is not None and change.transfer.low is not None and change.transfer.low > 0:
        transfer = RAISED
    good, bad = {RAISED, NOT_LOWERED}, {NOT_RAISED, LOWERED}
    return Finding(change, source, transfer, _both((source, transfer), good, bad))


def changes(
    rows: Sequence[Row], variants: Iterable[Variant], difference: Difference
) -> list[Change]:
    """Return the change of every variant at every sparsity, in percentage points.

    Args:
        rows: Rows of one model and source.
        variants: Variants, in the order of the result.
        difference: Difference of accuracies of a row, -1 to 1; None if the row has none.
    """
    found = []
    for variant in variants:
        own = [r for r in rows if (r.criterion, r.rounds) == (variant.criterion, variant.rounds)]
        for sparsity in sorted({r.sparsity for r in own}):
            change = _change(variant, sparsity, [r for r in own if r.sparsity == sparsity],
                             difference)  # fmt: skip
            if change.source is not None or change.transfer is not None:
                found.append(change)
    return found


def pooled(found: Sequence[Finding]) -> tuple[int, Interval | None, Interval | None]:
    """Return the mean change over the grid, with intervals over seeds.

    Seeds with missing grid points are excluded, so that all means are over the same grid.

    Returns:
        Number of grid points, interval of the source, interval of transfer.
    """
    intervals = []
    for side in (0, 1):
        points = [f.change.per_seed for f in found]
        points = [p for p in points if any(pair[side] is not None for pair in p.values())]
        seeds = in_order(seed for p in points for seed in p)
        whole = []
        for seed in seeds:
            values = [p.get(seed, (None, None))[side] for p in points]
            numbers = [v for v in values if v is not None]
            if len(numbers) == len(points):
                whole.append(mean(numbers))
        intervals.append(t_interval(whole) if whole else None)
    return len(found), intervals[0], intervals[1]


def pruning_loss(row: Row) -> float | None:
    """Return pruned minus dense accuracy, for P1."""
    return row.pruned - row.dense


def tuning_gain(row: Row) -> float | None:
    """Return fine-tuned minus pruned accuracy, for P2."""
    return None if row.tuned is None else row.tuned - row.pruned


def _section(results: Results, model: str, source: str, margin: float) -> Section:
    rows = [r for r in results.rows if (r.model, r.source) == (model, source)]
    present = {(r.criterion, r.rounds) for r in rows}
    variants = [m for key, m in results.variants.items() if key in present]
    tasks = in_order((r.task, r.role) for r in rows)
    listed = results.settings.get("tasks", [])
    names = [t.get("name") if isinstance(t, dict) else t for t in listed]
    tasks.sort(key=lambda t: (t[1] != SOURCE, names.index(t[0]) if t[0] in names else len(names)))
    pruned = [r for r in rows if r.sparsity > 0]
    control = changes([r for r in rows if r.sparsity == 0], variants, tuning_gain)
    return Section(
        model=model,
        source=source,
        rows=rows,
        variants=variants,
        sparsities=sorted({r.sparsity for r in rows}),
        seeds=sorted({r.seed for r in rows}),
        tasks=tasks,
        p1=[judge_pruning(c, margin) for c in changes(pruned, variants, pruning_loss)],
        p2=[judge_tuning(c, margin) for c in changes(pruned, variants, tuning_gain)],
        control=control[0] if control else None,
    )


def _change(
    variant: Variant, sparsity: float, rows: Sequence[Row], difference: Difference
) -> Change:
    points: dict[int, dict[str, dict[str, float]]] = {}
    tasks: dict[str, set[str]] = {SOURCE: set(), TRANSFER: set()}
    for row in rows:
        tasks[row.role].add(row.task)
        value = difference(row)
        if value is not None:
            roles = points.setdefault(row.seed, {SOURCE: {}, TRANSFER: {}})
            roles[row.role][row.task] = 100 * value
    per_seed = {}
    for seed in sorted(points):
        # Seeds with missing tasks are excluded, so that all means are over the same tasks.
        sides = [
            mean(list(points[seed][role].values()))
            if points[seed][role] and points[seed][role].keys() == tasks[role]
            else None
            for role in (SOURCE, TRANSFER)
        ]
        per_seed[seed] = (sides[0], sides[1])
    pairs = per_seed.values()
    by_task = {
        task: [p[TRANSFER][task] for p in points.values() if task in p[TRANSFER]]
        for task in sorted(tasks[TRANSFER])
    }
    means = [(task, mean(values)) for task, values in by_task.items() if values]
    return Change(
        variant=variant,
        sparsity=sparsity,
        source=_interval([s for s, _ in pairs if s is not None]),
        transfer=_interval([t for _, t in pairs if t is not None]),
        gap=_interval([t - s for s, t in pairs if s is not None and t is not None]),
        worst=min(means, key=lambda pair: pair[1]) if means else None,
        per_seed=per_seed,
    )


def _interval(values: list[float]) -> Interval | None:
    return t_interval(values) if values else None


def _loss_verdict(interval: Interval | None, margin: float, good: str, bad: str) -> str:
    if interval is None:
        return ABSENT
    if interval.low is None or interval.high is None:
        return UNKNOWN
    if interval.low >= -margin:
        return good
    return bad if interval.high < 0 else OPEN


def _gain_verdict(interval: Interval | None) -> str:
    if interval is None:
        return ABSENT
    if interval.low is None or interval.high is None:
        return UNKNOWN
    if interval.low > 0:
        return RAISED
    return NOT_RAISED if interval.high <= 0 else OPEN


def _both(sides: tuple[str, str], good: set[str], bad: set[str]) -> str:
    if any(side in bad for side in sides):
        return NOT_HELD
    for missing in (ABSENT, UNKNOWN):
        if missing in sides:
            return missing
    return HELD if all(side in good for side in sides) else OPEN
