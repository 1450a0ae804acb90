"""Render the report as Markdown, short enough for a README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fastsal.study.folder_format import SOURCE
from fastsal.study.report import summaries, wording
from fastsal.study.report.findings import MARGIN, Finding, Section, sections
from fastsal.study.report.provenance import command, provenance
from fastsal.study.report.results import Results

_SPACE = re.compile(r"[^\S\u00a0]+")  # all but the non-breaking space
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~])")


def page(
    results: Results,
    *,
    margin: float = MARGIN,
    pictures: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """Return the report of a study as Markdown.

    Args:
        results: Results of the study.
        margin: Loss in percentage points that still counts as kept.
        pictures: `{(model, source): link}` of pictures of accuracy versus sparsity.
    """
    found = sections(results, margin)
    lines = [f"## {_text(results.name)}", "", _text(wording.what_was_done(results, found)), ""]
    if len(found) > 1:
        overview = summaries.overview_table(found)
        lines += [*table(overview.columns, overview.rows, overview.numeric), ""]
    for section in found:
        if len(found) > 1:
            lines += [f"### {_text(section.model)}, pruned on {_text(section.source)}", ""]
        lines += [*_section(section, (pictures or {}).get((section.model, section.source))), ""]
    if results.failures:
        lines += _failures(results)
    lines += [
        f"*{_text(line)}*\n" for line in wording.rule(margin, any(section.p2 for section in found))
    ]
    lines += _again(results)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section, picture: str | None) -> list[str]:
    found = [
        *wording.findings_of(section),
        *summaries.more_findings(section),
        wording.seed_note(section),
    ]
    lines = [*(f"- {_text(line)}" for line in found if line), ""]
    best = summaries.headline_table(section)
    lines += ["Criterion with the smallest drop on the source at each sparsity, points", ""]
    lines += [*table(best.columns, best.rows, best.numeric), ""]
    if picture:
        alternative = f"Accuracy versus sparsity of {section.model}, pruned on {section.source}"
        lines += [f"![{_text(alternative)}]({picture})", ""]
    lines += _changes("P1: pruned − dense, points", section.p1)
    lines += _changes("P2: fine-tuned − pruned, points", section.p2)
    for title, after in (("before fine-tuning", False), ("after fine-tuning", True)):
        if after and not section.p2:
            continue
        heads = ["task", *(wording.sparsity(s) for s in section.pruned_at)]
        rows = [[_task(*task), *(_winner(section, task[0], s, after) for s in section.pruned_at)]
                for task in section.tasks]  # fmt: skip
        lines += [f"Best criterion per task, {title}: accuracy in %, margin over the runner-up", ""]
        lines += [*table(heads, rows, frozenset()), ""]
    cost = summaries.cost_table(section)
    if len(cost.columns) > 2:
        lines += ["Cost, medians over cells", "", *table(cost.columns, cost.rows, cost.numeric), ""]
    return lines


def _changes(title: str, found: Sequence[Finding]) -> list[str]:
    if not found:
        return []
    rows = [
        [f.change.variant.label, wording.sparsity(f.change.sparsity),
         wording.bounds(f.change.source), wording.bounds(f.change.transfer), f.verdict]
        for f in found
    ]  # fmt: skip
    heads = ["criterion", "sparsity", "source", "transfer", title.partition(":")[0]]
    return [title, "", *table(heads, rows, frozenset({1, 2, 3})), ""]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> list[str]:
    """Return the lines of a table; columns in `right` are right-aligned."""
    rule = ["---:" if i in right else "---" for i in range(len(heads))]
    cells = [[_text(cell) for cell in row] for row in (heads, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def _winner(section: Section, task: str, sparsity: float, after: bool) -> str:
    best = summaries.winner(section, task, sparsity, after)
    if best is None:
        return wording.NONE
    margin = f" ({best.margin})" if best.margin else ""
    return f"{best.variant.label} {wording.percent(best.accuracy)}{margin}"


def _task(task: str, role: str) -> str:
    return f"{task} (source)" if role == SOURCE else task


def _failures(results: Results) -> list[str]:
    rows = [
        [f.model, f.source, results.variants[f.criterion, f.rounds].label,
         wording.sparsity(f.sparsity), str(f.seed), f.error or wording.NONE]
        for f in results.failures
    ]  # fmt: skip
    heads = ["model", "source", "criterion", "sparsity", "seed", "error"]
    title = f"{wording.number(len(rows), 'failed cell')}, excluded from all results"
    return [title, "", *table(heads, rows, frozenset()), ""]


def _again(results: Results) -> list[str]:
    facts = [f"{name}: {value}" for name, value in provenance(results) if name != "command"]
    lines = [_text("; ".join(facts) + "."), ""]
    text = command(results)
    if text:
        fence = "`" * max([2, *(len(run) for run in re.findall("`+", text))]) + "`"
        lines += ["To reproduce:", "", f"{fence}sh", text, fence]
    return lines


def _text(text: str) -> str:
    """Escape Markdown markup and join lines."""
    return _SPECIAL.sub(r"\\\1", _SPACE.sub(" ", text).strip())
