"""Tables that a study comes down to: verdicts, winners, cost, every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastsal.study.report import wording
from fastsal.study.report.figures import Table
from fastsal.study.report.findings import HELD, Finding, Section, pooled
from fastsal.study.report.intervals import mean, median, t_interval
from fastsal.study.report.results import Method, Row

MOST_ROWS = 4000  # of the table of all rows; beyond, seeds are averaged


@dataclass(frozen=True)
class Winner:
    """The best method on a task at a sparsity.

    Attributes:
        method: with the highest mean accuracy.
        accuracy: its mean, 0 to 1.
        margin: over the second, in points with an interval; empty without a second.
        second: its label.
        separated: whether the interval of the margin is above 0.
        tied: whether the second has the same mean.
    """

    method: Method
    accuracy: float
    margin: str
    second: str
    separated: bool
    tied: bool = False


def winner(part: Section, task: str, sparsity: float, after: bool) -> Winner | None:
    """Return the method of the highest mean accuracy; its margin is paired by seed."""
    found = []
    for method in part.methods:
        values = {}
        for row in part.select(method, sparsity, task):
            value = row.tuned if after else row.pruned
            if value is not None:
                values[row.seed] = value
        if values:
            found.append((mean(list(values.values())), method, values))
    if not found:
        return None
    found.sort(key=lambda item: -item[0])
    top, method, best = found[0]
    if len(found) == 1:
        return Winner(method, top, "", "", False)
    next_best, runner_up, second = found[1]
    tied = next_best == top
    pairs = [100 * (best[seed] - second[seed]) for seed in best if seed in second]
    if not pairs:
        return Winner(method, top, "", runner_up.label, False, tied)
    margin = t_interval(pairs)
    separated = margin.low is not None and margin.low > 0
    return Winner(method, top, wording.bounds(margin), runner_up.label, separated, tied)


def change_table(found: Sequence[Finding], name: str) -> Table:
    """Return P1 or P2 in numbers, a row a method and sparsity."""
    rows = []
    for f in found:
        c = f.change
        n = max((i.n for i in (c.source, c.transfer) if i is not None), default=0)
        worst = wording.NONE if c.worst is None else f"{wording.points(c.worst[1])} {c.worst[0]}"
        rows.append([
            c.method.label, f"{100 * c.sparsity:.6g}", str(n), f.verdict, wording.bounds(c.source),
            f.source, wording.bounds(c.transfer), f.transfer, wording.bounds(c.gap), worst,
        ])  # fmt: skip
    return Table(
        ["criterion", "sparsity, %", "seeds", name, "source", "source is", "transfer",
         "transfer is", "transfer − source", "worst transfer task"],
        rows, frozenset({1, 2, 4, 6, 8}),
    )  # fmt: skip


def headline_table(part: Section) -> Table:
    """Return what pruning and tuning did at each sparsity, by the least drop on the source."""
    tuned = {(f.change.method, f.change.sparsity): f for f in part.p2}
    rows = []
    for sparsity in part.pruned_at:
        here = [f for f in part.p1 if f.change.sparsity == sparsity and f.change.source]
        if not here:
            continue
        best = max(here, key=lambda f: f.change.source.mean if f.change.source else 0.0)
        row = [wording.sparsity(sparsity), best.change.method.label]
        for finding in (best, tuned.get((best.change.method, sparsity))):
            change = finding.change if finding else None
            row += [wording.bounds(change.source if change else None),
                    wording.bounds(change.transfer if change else None),
                    finding.verdict if finding else wording.NONE]  # fmt: skip
        rows.append(row)
    columns = ["sparsity", "criterion", "pruning: source", "transfer", "P1",
               "fine-tuning: source", "transfer", "P2"]  # fmt: skip
    shown = 8 if part.p2 else 5
    return Table(columns[:shown], [row[:shown] for row in rows], frozenset({2, 3, 5, 6}))


def overview_table(parts: Sequence[Section]) -> Table:
    """Return a row a model and source: where P1 and P2 held, and the mean gain of fine-tuning."""
    rows = []
    for part in parts:
        held = [f.change.sparsity for f in part.p1 if f.verdict == HELD]
        row = [part.model, part.source, f"{len(held)} of {len(part.p1)}",
               wording.sparsity(max(held)) if held else wording.NONE]  # fmt: skip
        if part.p2:
            count, source, transfer = pooled(part.p2)
            good = sum(f.verdict == HELD for f in part.p2)
            row += [f"{good} of {count}", wording.bounds(source), wording.bounds(transfer)]
        else:
            row += [wording.NONE] * 3
        rows.append(row)
    columns = ["model", "source", "P1 held", "up to", "P2 held", "mean gain: source", "transfer"]
    return Table(columns, rows, frozenset({2, 3, 4, 5, 6}))


def more_findings(part: Section) -> list[str]:
    """Say which criterion was best most often, and how well the loss was predicted."""
    lines = []
    if len(part.methods) > 1:
        total = len(part.tasks) * len(part.pruned_at)
        for stage, after in (("before", False), ("after", True)):
            if after and not part.p2:
                continue
            best, ties = wins(part, after)
            counts = [f"{m.label} ({count})" for m, count in best if count]
            if len(counts) > 4:
                counts[4:] = [f"{len(counts) - 4} others"]
            if ties:
                counts.append(f"ties ({ties})")
            lines.append(
                f"Highest mean accuracy {stage} fine-tuning, of {wording.number(total, 'point')} "
                f"(task × sparsity): {', '.join(counts)}."
            )
    cells = {row.cell: row for row in part.rows}.values()
    ratios = [r.measured_increase / r.predicted_increase for r in cells
              if r.predicted_increase and r.measured_increase is not None
              and r.predicted_increase > 0]  # fmt: skip
    if ratios:
        lines.append(
            f"Measured over predicted increase of the loss on the source: median "
            f"{wording.short(median(ratios))} over {wording.number(len(ratios), 'cell')}."
        )
    return lines


def verdict_table(part: Section, found: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    """Return verdicts as a grid: sparsities across, methods down; empty where nothing is known."""
    at = {(f.change.method.index, f.change.sparsity): f.verdict for f in found}
    heads = [wording.sparsity(s) for s in part.pruned_at]
    rows = [[m.label, *(at.get((m.index, s), "") for s in part.pruned_at)] for m in part.methods]
    return heads, rows


def cost_table(part: Section) -> Table:
    """Return medians over cells of seconds and of memory, a row a method."""
    rows = []
    for method in part.methods:
        key = (method.criterion, method.rounds)
        cells = list({r.cell: r for r in part.rows if (r.criterion, r.rounds) == key}.values())
        seconds = [_median([getattr(r, f"seconds_{stage}") for r in cells])
                   for stage in ("statistics", "prune", "evaluate", "finetune")]  # fmt: skip
        memory = [_median([r.peak_memory_bytes for r in cells]),
                  _median([r.statistics_bytes for r in cells])]  # fmt: skip
        rows.append([method.label, *map(wording.short, seconds), *map(wording.size, memory),
                     str(len(cells))])  # fmt: skip
    columns = ["criterion", "statistics, s", "prune, s", "evaluate, s", "fine-tune, s",
               "peak memory", "statistics, size", "cells"]  # fmt: skip
    filled = [i for i in range(len(columns)) if any(row[i] != wording.NONE for row in rows)]
    return Table([columns[i] for i in filled], [[row[i] for i in filled] for row in rows],
                 frozenset(range(1, len(filled))))  # fmt: skip


def wins(part: Section, after: bool) -> tuple[list[tuple[Method, int]], int]:
    """Count over tasks and sparsities how often each method alone is best.

    Returns:
        `(method, count)`, the most frequent first, and the number of ties.
    """
    counts, ties = dict.fromkeys(part.methods, 0), 0
    for task, _ in part.tasks:
        for sparsity in part.pruned_at:
            best = winner(part, task, sparsity, after)
            if best is not None and best.tied:
                ties += 1
            elif best is not None:
                counts[best.method] += 1
    return sorted(counts.items(), key=lambda item: -item[1]), ties


def full_table(parts: Sequence[Section]) -> tuple[Table, bool]:
    """Return every row; where they are too many for a page, means over seeds.

    Returns:
        The table, and whether seeds were averaged.
    """
    total = sum(len(part.rows) for part in parts)
    averaged = total > MOST_ROWS
    rows = []
    for part in parts:
        for method in part.methods:
            for sparsity in part.sparsities:
                for task, role in part.tasks:
                    found = part.select(method, sparsity, task)
                    groups = [found] if averaged else [[row] for row in found]
                    rows += [_full_row(part, method, group, role) for group in groups if group]
    columns = ["model", "source", "criterion", "sparsity, %", "seed", "task", "role", "head",
               "dense, %", "pruned, %", "fine-tuned, %"]  # fmt: skip
    if averaged:
        columns[4] = "seeds"
    return Table(columns, rows, frozenset({3, 4, 8, 9, 10})), averaged


def _full_row(part: Section, method: Method, rows: Sequence[Row], role: str) -> list[str]:
    first = rows[0]
    tuned = [row.tuned for row in rows if row.tuned is not None]
    return [
        part.model, part.source, method.label, f"{100 * first.sparsity:.6g}",
        str(first.seed if len(rows) == 1 else len(rows)), first.task, role,
        first.head or wording.NONE,
        wording.percent(mean([row.dense for row in rows]), 2),
        wording.percent(mean([row.pruned for row in rows]), 2),
        wording.percent(mean(tuned) if tuned else None, 2),
    ]  # fmt: skip


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None
