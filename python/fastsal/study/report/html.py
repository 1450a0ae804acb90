"""The report as one HTML page that asks for nothing from outside."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from fastsal.errors import FastsalError
from fastsal.study.report import figures, forest, looks, palette, summaries, wording
from fastsal.study.report.chart import Ids, marker, method_group, wrap
from fastsal.study.report.figures import Figure, Table
from fastsal.study.report.findings import MARGIN, Finding, Section, sections
from fastsal.study.report.provenance import provenance, settings_text
from fastsal.study.report.results import Method, Results

BOTH_STAGES = 4  # methods; with more, lines of after fine-tuning wait for a click


@dataclass(frozen=True)
class Prediction:
    """P1 or P2 on the page: its verdicts, its figure and its numbers."""

    name: str
    claim: str
    measured: str
    verdicts: tuple[list[str], list[list[str]]]
    panels: list[str]
    table: Table


@dataclass(frozen=True)
class Part:
    """Everything that the page shows of one model and source."""

    key: str
    section: Section
    seeds: str
    findings: list[str]
    headline: Table
    accuracy: Figure
    predictions: list[Prediction]
    winners: list[tuple[str, list[list[Any]]]]
    layers: Figure | None
    predicted: Figure | None
    cost: Table
    paths: list[tuple[str, Figure]]
    overlaps: Figure | None


def page(results: Results, *, landscape: bool = True, margin: float = MARGIN) -> str:
    """Return the report of a study as HTML.

    Args:
        results: of the study.
        landscape: whether to show losses along lines and overlaps, where there are any.
        margin: points that a mean may lose and still count as kept.

    Raises:
        FastsalError: jinja2 is not installed.
    """
    if find_spec("jinja2") is None:
        raise FastsalError("the page needs jinja2: pip install 'fastsal[report]'; or --format md")
    import jinja2

    ids = Ids()
    parts = [
        _part(results, section, f"part-{i}", landscape, margin, ids)
        for i, section in enumerate(sections(results, margin), 1)
    ]
    judged = [part.section for part in parts]
    table, averaged = summaries.full_table(judged)
    tuned = any(section.p2 for section in judged)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastsal.study.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("study.html.j2").render(
        results=results,
        done=wording.what_was_done(results, judged),
        paper=wording.PAPER,
        paper_url=wording.PAPER_URL,
        parts=parts,
        rule=wording.rule(margin, tuned),
        brief_rule=wording.brief_rule(margin, tuned),
        tuned=tuned,
        failures=[_failure(results, failure) for failure in results.failures],
        provenance=provenance(results),
        settings=settings_text(results),
        overview=summaries.overview_table(judged),
        single=all(len(section.seeds) == 1 for section in judged),
        table=table,
        averaged=averaged,
        both=len(results.methods) <= BOTH_STAGES,
        swatch=lambda method: _swatch(method, ids),
        light=palette.LIGHT,
        dark=palette.DARK,
        percent=wording.percent,
        sparsity=wording.sparsity,
        none=wording.NONE,
    )


def _part(
    results: Results, part: Section, key: str, landscape: bool, margin: float, ids: Ids
) -> Part:
    predictions = []
    for name, claim, measured, found in (
        ("P1", "pruning on the source keeps both", "pruned − dense", part.p1),
        ("P2", "fine-tuning on the source raises it and does not lower the others",
         "fine-tuned − pruned", part.p2),
    ):  # fmt: skip
        if found:
            predictions.append(_prediction(part, name, claim, measured, found, margin, ids))
    return Part(
        key=key,
        section=part,
        seeds=wording.seed_note(part),
        findings=[*wording.findings_of(part), *summaries.more_findings(part)],
        headline=summaries.headline_table(part),
        accuracy=figures.accuracy(part, ids),
        predictions=predictions,
        winners=_winners(part),
        layers=figures.layers(part, results.layers, ids),
        predicted=figures.predicted(part, ids),
        cost=summaries.cost_table(part),
        paths=[
            (wording.sparsity(sparsity), figure)
            for sparsity, figure in looks.paths(part, results.landscape, ids)
        ]
        if landscape
        else [],
        overlaps=looks.overlaps(part, results.overlap, ids) if landscape else None,
    )


def _prediction(
    part: Section, name: str, claim: str, measured: str, found: list[Finding], margin: float,
    ids: Ids,
) -> Prediction:  # fmt: skip
    return Prediction(
        name=name,
        claim=claim,
        measured=measured,
        verdicts=summaries.verdict_table(part, found),
        panels=forest.forest(part, found, measured, margin, ids),
        table=summaries.change_table(found, name),
    )


def _winners(part: Section) -> list[tuple[str, list[list[Any]]]]:
    stages = [("Before fine-tuning", False)]
    if part.p2:
        stages.append(("After fine-tuning on the source", True))
    return [
        (
            title,
            [
                [task, role, *(summaries.winner(part, task, s, after) for s in part.pruned_at)]
                for task, role in part.tasks
            ],
        )
        for title, after in stages
    ]


def _failure(results: Results, failure: Any) -> list[str]:
    method = results.methods[failure.criterion, failure.rounds]
    return [
        failure.model, failure.source, method.label, wording.sparsity(failure.sparsity),
        str(failure.seed), failure.error or wording.NONE,
    ]  # fmt: skip


def _swatch(method: Method, ids: Ids) -> str:
    inner = '<path class="ln" d="M1 7H27"/>' + marker(method.index, 14, 7, 4)
    return wrap(method_group(method.index, inner), 28, 14, method.label, "Mark in the figures", ids)
