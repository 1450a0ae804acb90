"""The report as Markdown, short enough for a README: findings, tables, the command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fastsal.study.report import summaries, wording
from fastsal.study.report.findings import MARGIN, Finding, Section, sections
from fastsal.study.report.provenance import command, provenance
from fastsal.study.report.results import SOURCE, Results

_SPACE = re.compile(r"[^\S\u00a0]+")  # all but the space that is never broken
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~])")


def page(
    results: Results,
    *,
    margin: float = MARGIN,
    pictures: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """Return the report of a study as Markdown.

    Args:
        results: of the study.
        margin: points that a mean may lose and still count as kept.
        pictures: `{(model, source): link}` of pictures of accuracy against sparsity.
    """
    parts = sections(results, margin)
    lines = [f"## {_text(results.name)}", "", _text(wording.what_was_done(results, parts)), ""]
    if len(parts) > 1:
        every = summaries.overview_table(parts)
        lines += [*table(every.columns, every.rows, every.numeric), ""]
    for part in parts:
        if len(parts) > 1:
            lines += [f"### {_text(part.model)}, pruned on {_text(part.source)}", ""]
        lines += [*_part(part, (pictures or {}).get((part.model, part.source))), ""]
    if results.failures:
        lines += _failures(results)
    lines += [f"*{_text(line)}*\n" for line in wording.rule(margin, any(p.p2 for p in parts))]
    lines += _again(results)
    return "\n".join(lines).rstrip() + "\n"


def _part(part: Section, picture: str | None) -> list[str]:
    found = [*wording.findings_of(part), *summaries.more_findings(part), wording.seed_note(part)]
    lines = [*(f"- {_text(line)}" for line in found if line), ""]
    best = summaries.headline_table(part)
    lines += ["At each sparsity the criterion with the least drop on the source, points", ""]
    lines += [*table(best.columns, best.rows, best.numeric), ""]
    if picture:
        alternative = f"Accuracy against sparsity of {part.model}, pruned on {part.source}"
        lines += [f"![{_text(alternative)}]({picture})", ""]
    lines += _changes("P1: pruned − dense, points", part.p1)
    lines += _changes("P2: fine-tuned − pruned, points", part.p2)
    for title, after in (("before fine-tuning", False), ("after fine-tuning", True)):
        if after and not part.p2:
            continue
        heads = ["task", *(wording.sparsity(s) for s in part.pruned_at)]
        rows = [[_task(*task), *(_winner(part, task[0], s, after) for s in part.pruned_at)]
                for task in part.tasks]  # fmt: skip
        lines += [f"Best criterion per task, {title}: accuracy in %, margin over the second", ""]
        lines += [*table(heads, rows, frozenset()), ""]
    cost = summaries.cost_table(part)
    if len(cost.columns) > 2:
        lines += ["Cost, medians over cells", "", *table(cost.columns, cost.rows, cost.numeric), ""]
    return lines


def _changes(title: str, found: Sequence[Finding]) -> list[str]:
    if not found:
        return []
    rows = [
        [f.change.method.label, wording.sparsity(f.change.sparsity),
         wording.bounds(f.change.source), wording.bounds(f.change.transfer), f.verdict]
        for f in found
    ]  # fmt: skip
    heads = ["criterion", "sparsity", "source", "transfer", title.partition(":")[0]]
    return [title, "", *table(heads, rows, frozenset({1, 2, 3})), ""]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> list[str]:
    """Return the lines of a table; columns in `right` are set to the right."""
    rule = ["---:" if i in right else "---" for i in range(len(heads))]
    cells = [[_text(cell) for cell in row] for row in (heads, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def _winner(part: Section, task: str, sparsity: float, after: bool) -> str:
    best = summaries.winner(part, task, sparsity, after)
    if best is None:
        return wording.NONE
    margin = f" ({best.margin})" if best.margin else ""
    return f"{best.method.label} {wording.percent(best.accuracy)}{margin}"


def _task(task: str, role: str) -> str:
    return f"{task} (source)" if role == SOURCE else task


def _failures(results: Results) -> list[str]:
    rows = [
        [f.model, f.source, results.methods[f.criterion, f.rounds].label,
         wording.sparsity(f.sparsity), str(f.seed), f.error or wording.NONE]
        for f in results.failures
    ]  # fmt: skip
    heads = ["model", "source", "criterion", "sparsity", "seed", "error"]
    title = f"{wording.number(len(rows), 'failed cell')}, left out of every number"
    return [title, "", *table(heads, rows, frozenset()), ""]


def _again(results: Results) -> list[str]:
    facts = [f"{name}: {value}" for name, value in provenance(results) if name != "command"]
    lines = [_text("; ".join(facts) + "."), ""]
    text = command(results)
    if text:
        fence = "`" * max([2, *(len(run) for run in re.findall("`+", text))]) + "`"
        lines += ["Again:", "", f"{fence}sh", text, fence]
    return lines


def _text(text: str) -> str:
    """Escape what Markdown would read as markup, and keep it on one line."""
    return _SPECIAL.sub(r"\\\1", _SPACE.sub(" ", text).strip())
