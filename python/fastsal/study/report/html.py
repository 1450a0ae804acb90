"""Render the report as one self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastsal.study.report import (
    diagnostic_figures,
    figures,
    forest,
    palette,
    summaries,
    wording,
)
from fastsal.study.report.chart import Ids, marker, variant_group, wrap
from fastsal.study.report.figures import Figure, Table
from fastsal.study.report.findings import MARGIN, Finding, Section, sections
from fastsal.study.report.provenance import provenance, settings_text
from fastsal.study.report.rendering import rendered
from fastsal.study.report.results import Results, Variant

BOTH_STAGES = 4  # variants; with more, lines after fine-tuning are hidden at first


@dataclass(frozen=True)
class Prediction:
    """Verdicts, figure and table of P1 or P2."""

    name: str
    claim: str
    measured: str
    verdicts: tuple[list[str], list[list[str]]]
    panels: list[str]
    table: Table


@dataclass(frozen=True)
class SectionView:
    """Content of the page for one model and source."""

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
    loss_lines: list[tuple[str, Figure]]
    overlaps: Figure | None


def page(results: Results, *, diagnostics: bool = True, margin: float = MARGIN) -> str:
    """Return the report of a study as HTML.

    Args:
        results: Results of the study.
        diagnostics: Whether to show loss lines and Fisher overlaps, if the results have them.
        margin: Loss in percentage points that still counts as kept.

    Raises:
        FastsalError: jinja2 is not installed.
    """
    ids = Ids()
    views = [
        _view(results, section, f"section-{i}", diagnostics, margin, ids)
        for i, section in enumerate(sections(results, margin), 1)
    ]
    judged = [view.section for view in views]
    table, averaged = summaries.full_table(judged)
    tuned = any(section.p2 for section in judged)
    return rendered(
        "study.html.j2",
        results=results,
        done=wording.what_was_done(results, judged),
        paper=wording.PAPER,
        paper_url=wording.PAPER_URL,
        views=views,
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
        both=len(results.variants) <= BOTH_STAGES,
        swatch=lambda variant: _swatch(variant, ids),
        light=palette.LIGHT,
        dark=palette.DARK,
        percent=wording.percent,
        sparsity=wording.sparsity,
        none=wording.NONE,
    )


def _view(
    results: Results, section: Section, key: str, diagnostics: bool, margin: float, ids: Ids
) -> SectionView:
    predictions = []
    for name, measured, found in (
        ("P1", "pruned − dense", section.p1),
        ("P2", "fine-tuned − pruned", section.p2),
    ):
        if found:
            predictions.append(_prediction(section, name, measured, found, margin, ids))
    return SectionView(
        key=key,
        section=section,
        seeds=wording.seed_note(section),
        findings=[*wording.findings_of(section), *summaries.more_findings(section)],
        headline=summaries.headline_table(section),
        accuracy=figures.accuracy(section, ids),
        predictions=predictions,
        winners=_winners(section),
        layers=figures.layers(section, results.layers, ids),
        predicted=figures.predicted(section, ids),
        cost=summaries.cost_table(section),
        loss_lines=[
            (wording.sparsity(sparsity), figure)
            for sparsity, figure in diagnostic_figures.loss_lines(section, results.loss_lines, ids)
        ]
        if diagnostics
        else [],
        overlaps=diagnostic_figures.overlaps(section, results.overlaps, ids)
        if diagnostics
        else None,
    )


def _prediction(
    section: Section, name: str, measured: str, found: list[Finding], margin: float,
    ids: Ids,
) -> Prediction:  # fmt: skip
    return Prediction(
        name=name,
        claim=wording.CLAIMS[name],
        measured=measured,
        verdicts=summaries.verdict_table(section, found),
        panels=forest.forest(section, found, measured, margin, ids),
        table=summaries.change_table(found, name),
    )


def _winners(section: Section) -> list[tuple[str, list[list[Any]]]]:
    stages = [("Before fine-tuning", False)]
    if section.p2:
        stages.append(("After fine-tuning on the source", True))
    return [
        (
            title,
            [
                [
                    task,
                    role,
                    *(summaries.winner(section, task, s, after) for s in section.pruned_at),
                ]
                for task, role in section.tasks
            ],
        )
        for title, after in stages
    ]


def _failure(results: Results, failure: Any) -> list[str]:
    variant = results.variants[failure.criterion, failure.rounds]
    return [
        failure.model, failure.source, variant.label, wording.sparsity(failure.sparsity),
        str(failure.seed), failure.error or wording.NONE,
    ]  # fmt: skip


def _swatch(variant: Variant, ids: Ids) -> str:
    inner = '<path class="ln" d="M1 7H27"/>' + marker(variant.index, 14, 7, 4)
    return wrap(
        variant_group(variant.index, inner), 28, 14, variant.label, "Mark in the figures", ids
    )
