"""P1 and P2 as measured differences, and what the intervals permit to say.

Two predictions of "A Second-Order Perspective on Pruning at Initialization and Knowledge Transfer"
(arXiv 2509.24066). P1: pruning on the source keeps both the source and the tasks that pruning
never saw. P2: fine-tuning the pruned backbone on the source raises the source and does not lower
the others.

A difference is taken within a seed: source = mean over the source's tasks, transfer = mean over
the tasks that pruning never saw; then come mean and t-interval over seeds. Units: percentage
points of top-1 accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fastsal.study.report.intervals import Interval, mean, t_interval
from fastsal.study.report.results import SOURCE, TRANSFER, Method, Results, Row, in_order

MARGIN = 1.0  # points

HELD, NOT_HELD, OPEN = "held", "did not hold", "open"
UNKNOWN, ABSENT = "no interval", "not measured"
KEPT, DROPPED = "kept", "dropped"
RAISED, NOT_RAISED = "raised", "not raised"
NOT_LOWERED, LOWERED = "not lowered", "lowered"

Difference = Callable[[Row], "float | None"]


@dataclass(frozen=True)
class Change:
    """How one method at one sparsity changed accuracies, in points.

    Attributes:
        method: criterion and rounds.
        sparsity: asked for.
        source: mean over the source's tasks; None where there is nothing to take it from.
        transfer: mean over the tasks that pruning never saw; None likewise.
        gap: transfer minus source; None without both.
        worst: the transfer task with the least mean, and that mean.
        per_seed: `{seed: (source, transfer)}`.
    """

    method: Method
    sparsity: float
    source: Interval | None
    transfer: Interval | None
    gap: Interval | None
    worst: tuple[str, float] | None
    per_seed: dict[int, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Finding:
    """A change and its verdicts: on the source, on transfer, on the prediction."""

    change: Change
    source: str
    transfer: str
    verdict: str


@dataclass(frozen=True)
class Section:
    """One model pruned on one source.

    Attributes:
        model: its name.
        source: its name.
        rows: of the cells done.
        methods: those that have rows, in the study's order.
        sparsities: rising.
        seeds: rising.
        tasks: `(task, role)`, the source's first.
        p1: pruned minus dense, by method and sparsity.
        p2: tuned minus pruned; empty without fine-tuning.
        control: tuned minus dense where nothing was pruned; None where the study has no such cell.
    """

    model: str
    source: str
    rows: list[Row]
    methods: list[Method]
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
        """The sparsities above 0: with nothing pruned there is nothing to judge."""
        return [s for s in self.sparsities if s > 0]

    def select(self, method: Method, sparsity: float, task: str | None = None) -> list[Row]:
        """Return the rows of a method at a sparsity, of one task or of all, by seed."""
        found = self._by_point.get((method.criterion, method.rounds, sparsity), [])
        return [row for row in found if task is None or row.task == task]


def sections(results: Results, margin: float = MARGIN) -> list[Section]:
    """Divide results by model and source and judge both predictions in each.

    Args:
        results: of the study.
        margin: points that a mean may lose and still count as kept.
    """
    return [
        _section(results, model, source, margin)
        for model, source in in_order((row.model, row.source) for row in results.rows)
    ]


def judge_pruning(change: Change, margin: float) -> Finding:
    """P1: kept where the whole interval is at or above -margin; dropped where it is below 0."""
    source = _loss_verdict(change.source, margin, KEPT, DROPPED)
    transfer = _loss_verdict(change.transfer, margin, KEPT, DROPPED)
    return Finding(change, source, transfer, _both((source, transfer), {KEPT}, {DROPPED}))


def judge_tuning(change: Change, margin: float) -> Finding:
    """P2: the source raised where its whole interval is above 0, transfer judged as in P1."""
    source = _gain_verdict(change.source)
    transfer = _loss_verdict(change.transfer, margin, NOT_LOWERED, LOWERED)
    if change.transfer is not None and change.transfer.low is not None and change.transfer.low > 0:
        transfer = RAISED
    good, bad = {RAISED, NOT_LOWERED}, {NOT_RAISED, LOWERED}
    return Finding(change, source, transfer, _both((source, transfer), good, bad))


def changes(rows: Sequence[Row], methods: Iterable[Method], difference: Difference) -> list[Change]:
    """Return the change of every method at every sparsity, in points, where there is one.

    Args:
        rows: of one model and source.
        methods: in the order that is wanted.
        difference: of accuracies of one row, 0 to 1; None where it lacks one.
    """
    found = []
    for method in methods:
        own = [r for r in rows if (r.criterion, r.rounds) == (method.criterion, method.rounds)]
        for sparsity in sorted({r.sparsity for r in own}):
            change = _change(method, sparsity, [r for r in own if r.sparsity == sparsity],
                             difference)  # fmt: skip
            if change.source is not None or change.transfer is not None:
                found.append(change)
    return found


def pooled(found: Sequence[Finding]) -> tuple[int, Interval | None, Interval | None]:
    """Return the mean change over the whole grid, of source and of transfer, over seeds.

    Only seeds count in which no change of the grid is missing: another grid is another mean.

    Returns:
        The number of grid points, the intervals of source and of transfer.
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
    """Pruned minus dense: what P1 is about."""
    return row.pruned - row.dense


def tuning_gain(row: Row) -> float | None:
    """Tuned minus pruned: what P2 is about."""
    return None if row.tuned is None else row.tuned - row.pruned


def _section(results: Results, model: str, source: str, margin: float) -> Section:
    rows = [r for r in results.rows if (r.model, r.source) == (model, source)]
    present = {(r.criterion, r.rounds) for r in rows}
    methods = [m for key, m in results.methods.items() if key in present]
    tasks = in_order((r.task, r.role) for r in rows)
    listed = results.settings.get("tasks", [])
    names = [t.get("name") if isinstance(t, dict) else t for t in listed]
    tasks.sort(key=lambda t: (t[1] != SOURCE, names.index(t[0]) if t[0] in names else len(names)))
    pruned = [r for r in rows if r.sparsity > 0]
    control = changes([r for r in rows if r.sparsity == 0], methods, tuning_gain)
    return Section(
        model=model,
        source=source,
        rows=rows,
        methods=methods,
        sparsities=sorted({r.sparsity for r in rows}),
        seeds=sorted({r.seed for r in rows}),
        tasks=tasks,
        p1=[judge_pruning(c, margin) for c in changes(pruned, methods, pruning_loss)],
        p2=[judge_tuning(c, margin) for c in changes(pruned, methods, tuning_gain)],
        control=control[0] if control else None,
    )


def _change(method: Method, sparsity: float, rows: Sequence[Row], difference: Difference) -> Change:
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
        # A mean over fewer tasks than the other seeds have is another mean.
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
        method=method,
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
