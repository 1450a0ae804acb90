"""`fastsal bench`: figures are ratios of both jobs, and debug builds are refused."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fastsal import _core
from fastsal.cli import main
from fastsal.cli.bench.cases import BenchSize, cases_of
from fastsal.cli.bench.timing import Case, Comparison, Result, Skip, run


def test_both_sides_run_in_turn_and_the_median_ratio_is_kept():
    calls = []
    ratios = iter([3.0, 1.0, 2.0])
    comparison = Comparison(
        lambda: calls.append("ours"),
        lambda: calls.append("peer"),
        "a peer",
        lambda ours, theirs: next(ratios),
        pairs=3,
        after=lambda: "noted",
    )
    (result,) = run(iter([Case("a case", "times", 1.5, lambda: comparison)]))
    assert calls == ["ours"] + ["ours", "peer"] * 3
    assert (result.ratio, result.peer, result.note, result.met) == (2.0, "a peer", "noted", True)


def test_a_missing_peer_is_named():
    def setup():
        raise Skip("no peer")

    (result,) = run(iter([Case("a case", "times", 1.0, setup)]))
    assert (result.ratio, result.met, result.note) == (None, None, "skipped: no peer")


@pytest.mark.parametrize(("at_least", "met"), [(True, False), (False, True)])
def test_limits_have_a_direction(at_least, met):
    assert Result("", "", 2.0, at_least, ratio=1.0).met is met


def test_names_are_unique():
    for size in (BenchSize(), BenchSize.full()):
        names = [(case.name, case.limit) for case in cases_of(size)]
        assert len(set(names)) == len(names)


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "bench.json"
    given = ["bench", "--only", "blocks of 64, in float64", "--json", "--out", str(out)]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads(out.read_text())
    (row,) = record["results"]
    assert row["ratio"] > 0
    assert record["machine"]["torch"]


def test_a_debug_build_is_refused(monkeypatch):
    monkeypatch.setattr(_core, "build_info", lambda: ("0", "portable", False))
    result = CliRunner().invoke(main, ["bench"])
    assert result.exit_code == 2
    assert "debug build" in result.output
