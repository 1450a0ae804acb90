"""Summary tables of a study: verdicts, best criteria, cost and all results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastsal.study.report import wording
from fastsal.study.report.figures import Table
from fastsal.study.report.findings import HELD, Finding, Section, pooled
from fastsal.study.report.intervals import mean, median, t_interval
from fastsal.study.report.results import Row, Variant

MOST_ROWS = 4000  # of the table of all results; larger tables are averaged over seeds


@dataclass(frozen=True)
class Winner:
    """The best variant on a task at a sparsity.

    Attributes:
        variant: Variant with the highest mean accuracy.
        accuracy: Its mean accuracy, 0 to 1.
        margin: Margin over the runner-up in percentage points, with its interval; empty without a
            runner-up.
        second: Label of the runner-up.
        separated: Whether the interval of the margin is above 0.
        tied: Whether the runner-up has the same mean.
    """

    variant: Variant
    accuracy: float
    margin: str
    second: str
    separated: bool
    tied: bool = False


def winner(section: Section, task: str, sparsity: float, after: bool) -> Winner | None:
    """Return the variant with the highest mean accuracy and its margin, paired by seed."""
    found = []
    for variant in section.variants:
        values = {}
        for row in section.select(variant, sparsity, task):
            value = row.tuned if after else row.pruned
            if value is not None:
                values[row.seed] = value
        if values:
            found.append((mean(list(values.values())), variant, values))
    if not found:
        return None
    found.sort(key=lambda item: -item[0])
    top, variant, best = found[0]
    if len(found) == 1:
        return Winner(variant, top, "", "", False)
    next_best, runner_up, second = found[1]
    tied = next_best == top
    pairs = [100 * (best[seed] - second[seed]) for seed in best if seed in second]
    if not pairs:
        return Winner(variant, top, "", runner_up.label, False, tied)
    margin = t_interval(pairs)
    separated = margin.low is not None and margin.low > 0
    return Winner(variant, top, wording.bounds(margin), runner_up.label, separated, tied)


def change_table(found: Sequence[Finding], name: str) -> Table:
    """Return the changes and verdicts of P1 or P2, one row per variant and sparsity."""
    rows = []
    for f in found:
        c = f.change
        n = max((i.n for i in (c.source, c.transfer) if i is not None), default=0)
        worst = wording.NONE if c.worst is None else f"{wording.points(c.worst[1])} {c.worst[0]}"
        rows.append([
            c.variant.label, f"{100 * c.sparsity:.6g}", str(n), f.verdict, wording.bounds(c.source),
            f.source, wording.bounds(c.transfer), f.transfer, wording.bounds(c.gap), worst,
        ])  # fmt: skip
    return Table(
        ["criterion", "sparsity, %", "seeds", name, "source", "source verdict", "transfer",
         "transfer verdict", "transfer − source", "worst transfer task"],
        rows, frozenset({1, 2, 4, 6, 8}),
    )  # fmt: skip


def headline_table(section: Section) -> Table:
    """Return changes and verdicts of the criterion with the smallest source drop per sparsity."""
    tuned = {(f.change.variant, f.change.sparsity): f for f in section.p2}
    rows = []
    for sparsity in section.pruned_at:
        here = [f for f in section.p1 if f.change.sparsity == sparsity and f.change.source]
        if not here:
            continue
        best = max(here, key=lambda f: f.change.source.mean if f.change.source else 0.0)
        row = [wording.sparsity(sparsity), best.change.variant.label]
        for finding in (best, tuned.get((best.change.variant, sparsity))):
            change = finding.change if finding else None
            row += [wording.bounds(change.source if change else None),
                    wording.bounds(change.transfer if change else None),
                    finding.verdict if finding else wording.NONE]  # fmt: skip
        rows.append(row)
    columns = ["sparsity", "criterion", "pruning: source", "pruning: transfer", "P1",
               "fine-tuning: source", "fine-tuning: transfer", "P2"]  # fmt: skip
    shown = 8 if section.p2 else 5
    return Table(columns[:shown], [row[:shown] for row in rows], frozenset({2, 3, 5, 6}))


def overview_table(sections: Sequence[Section]) -> Table:
    """Return how often P1 and P2 held and the mean gain of fine-tuning, per model and source."""
    rows = []
    for section in sections:
        held = [f.change.sparsity for f in section.p1 if f.verdict == HELD]
        row = [section.model, section.source, f"{len(held)} of {len(section.p1)}",
               wording.sparsity(max(held)) if held else wording.NONE]  # fmt: skip
        if section.p2:
            count, source, transfer = pooled(section.p2)
            good = sum(f.verdict == HELD for f in section.p2)
            row += [f"{good} of {count}", wording.bounds(source), wording.bounds(transfer)]
        else:
            row += [wording.NONE] * 3
        rows.append(row)
    columns = ["model", "source", "P1 held", "P1 held up to", "P2 held", "mean gain: source",
               "mean gain: transfer"]  # fmt: skip
    return Table(columns, rows, frozenset({2, 3, 4, 5, 6}))


def more_findings(section: Section) -> list[str]:
    """Describe which criterion is best most often, and the accuracy of the predicted loss."""
    lines = []
    if len(section.variants) > 1:
        total = len(section.tasks) * len(section.pruned_at)
        for stage, after in (("before", False), ("after", True)):
            if after and not section.p2:
                continue
            best, ties = wins(section, after)
            counts = [f"{m.label} ({count})" for m, count in best if count]
            if len(counts) > 4:
                counts[4:] = [f"{len(counts) - 4} others"]
            if ties:
                counts.append(f"ties ({ties})")
            lines.append(
                f"Criterion with the highest mean accuracy {stage} fine-tuning, at "
                f"{wording.number(total, 'combination')} (task × sparsity): {', '.join(counts)}."
            )
    cells = {row.cell: row for row in section.rows}.values()
    ratios = [r.measured_increase / r.predicted_increase for r in cells
              if r.predicted_increase and r.measured_increase is not None
              and r.predicted_increase > 0]  # fmt: skip
    if ratios:
        lines.append(
            "Ratio of measured to predicted loss increase on the source: median "
            f"{wording.short(median(ratios))} over {wording.number(len(ratios), 'cell')}."
        )
    return lines


def verdict_table(section: Section, found: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    """Return the sparsities, and one row of verdicts per variant; empty where not measured."""
    at = {(f.change.variant.index, f.change.sparsity): f.verdict for f in found}
    heads = [wording.sparsity(s) for s in section.pruned_at]
    rows = [
        [m.label, *(at.get((m.index, s), "") for s in section.pruned_at)] for m in section.variants
    ]
    return heads, rows


def cost_table(section: Section) -> Table:
    """Return medians over cells of seconds and memory, one row per variant."""
    rows = []
    for variant in section.variants:
        key = (variant.criterion, variant.rounds)
        cells = list({r.cell: r for r in section.rows if (r.criterion, r.rounds) == key}.values())
        seconds = [_median([getattr(r, f"seconds_{stage}") for r in cells])
                   for stage in ("statistics", "prune", "evaluate", "finetune")]  # fmt: skip
        memory = [_median([r.peak_memory_bytes for r in cells]),
                  _median([r.statistics_bytes for r in cells])]  # fmt: skip
        rows.append([variant.label, *map(wording.short, seconds), *map(wording.size, memory),
                     str(len(cells))])  # fmt: skip
    columns = ["criterion", "statistics, s", "prune, s", "evaluate, s", "fine-tune, s",
               "peak memory", "statistics size", "cells"]  # fmt: skip
    filled = [i for i in range(len(columns)) if any(row[i] != wording.NONE for row in rows)]
    return Table([columns[i] for i in filled], [[row[i] for i in filled] for row in rows],
                 frozenset(range(1, len(filled))))  # fmt: skip


def wins(section: Section, after: bool) -> tuple[list[tuple[Variant, int]], int]:
    """Count over tasks and sparsities how often each variant alone is best.

    Returns:
        `(variant, count)` in decreasing order of counts, and the number of ties.
    """
    counts, ties = dict.fromkeys(section.variants, 0), 0
    for task, _ in section.tasks:
        for sparsity in section.pruned_at:
            best = winner(section, task, sparsity, after)
            if best is not None and best.tied:
                ties += 1
            elif best is not None:
                counts[best.variant] += 1
    return sorted(counts.items(), key=lambda item: -item[1]), ties


def full_table(sections: Sequence[Section]) -> tuple[Table, bool]:
    """Return all results, averaged over seeds if there are more than `MOST_ROWS`.

    Returns:
        The table, and whether it is averaged over seeds.
    """
    total = sum(len(section.rows) for section in sections)
    averaged = total > MOST_ROWS
    rows = []
    for section in sections:
        for variant in section.variants:
            for sparsity in section.sparsities:
                for task, role in section.tasks:
                    found = section.select(variant, sparsity, task)
                    groups = [found] if averaged else [[row] for row in found]
                    rows += [_full_row(section, variant, group, role) for group in groups if group]
    columns = ["model", "source", "criterion", "sparsity, %", "seed", "task", "role", "head",
               "dense, %", "pruned, %", "fine-tuned, %"]  # fmt: skip
    if averaged:
        columns[4] = "seeds"
    return Table(columns, rows, frozenset({3, 4, 8, 9, 10})), averaged


def _full_row(section: Section, variant: Variant, rows: Sequence[Row], role: str) -> list[str]:
    first = rows[0]
    tuned = [row.tuned for row in rows if row.tuned is not None]
    return [
        section.model, section.source, variant.label, f"{100 * first.sparsity:.6g}",
        str(first.seed if len(rows) == 1 else len(rows)), first.task, role,
        first.head or wording.NONE,
        wording.percent(mean([row.dense for row in rows]), 2),
        wording.percent(mean([row.pruned for row in rows]), 2),
        wording.percent(mean(tuned) if tuned else None, 2),
    ]  # fmt: skip


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None
