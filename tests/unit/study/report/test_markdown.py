"""The report as Markdown."""

from __future__ import annotations

import re

import pytest

from fastsal.study.report import markdown
from fastsal.study.report.findings import sections
from fastsal.study.report.results import read_results
from fastsal.study.report.wording import bounds, points, sparsity

from .study_folder import write_study

WAYS = {
    "one seed": dict(seeds=(0,)),
    "one criterion": dict(criteria=("obs-greedy",)),
    "ten criteria": dict(criteria=tuple(f"criterion {i}" for i in range(10))),
    "one sparsity": dict(sparsities=(0.975,)),
    "no tuning": dict(tuned=False),
    "thirty tasks": dict(transfer=tuple(f"task {i}" for i in range(30))),
    "several": dict(models=("a", "b"), sources=("x", "y"), rounds=(1, 4)),
    "failures": dict(failed=[("random", 0.9, s) for s in range(3)]),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_table_is_whole(tmp_path, way):
    text = markdown.page(read_results(write_study(tmp_path, **way)))
    block = []
    tables = 0
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
            continue
        if block:
            assert len(set(block)) == 1
            assert len(block) > 2
            tables += 1
        block = []
    assert tables >= 3


def test_numbers_are_those_of_the_findings(tmp_path):
    results = read_results(write_study(tmp_path))
    (part,) = sections(results)
    plain = markdown.page(results).replace("\\", "")
    for finding in [*part.p1, *part.p2]:
        c = finding.change
        row = (f"| {c.variant.label} | {sparsity(c.sparsity)} | {bounds(c.source)} "
               f"| {bounds(c.transfer)} | {finding.verdict} |")  # fmt: skip
        assert row in plain


def test_names_cannot_break_the_page(tmp_path):
    name = "a|b *c* <script> `d` [e](f)"
    text = markdown.page(read_results(write_study(tmp_path, transfer=(name, "two\nlines"))))
    assert r"a\|b \*c\* \<script\> \`d\` \[e\](f)" in text
    assert "two lines" in text


def test_command_pictures_and_failures_are_there(tmp_path):
    results = read_results(write_study(tmp_path, failed=[("random", 0.9, 1)]))
    text = markdown.page(results, pictures={("resnet20", "cifar10"): "figures/a.svg"})
    assert "```sh\nfastsal transfer studies/cifar.toml" in text
    assert "](figures/a.svg)" in text
    assert "1 failed cell, excluded from all results" in text
    assert "FactorizationError" in text


def test_a_study_of_failures_alone_says_so(tmp_path):
    failed = [("obs-greedy", 0.7, s) for s in range(3)]
    folder = write_study(tmp_path, criteria=("obs-greedy",), sparsities=(0.7,), failed=failed)
    text = markdown.page(read_results(folder))
    assert "No cell of the study finished" in text
    assert "3 failed cells" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.4, "−0.40"), (0.004, "0.00"), (-0.004, "0.00"), (12.345, "+12.35"), (None, "–")],
)
def test_points_have_a_sign_unless_they_are_nothing(value, text):
    assert points(value) == text
