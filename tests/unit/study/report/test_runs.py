"""The report on a folder of runs: what is read, which run is picked, and the pages."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fastsal.cli import main
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.study.report.run_results import has_runs, read_runs
from fastsal.study.report.tradeoff import nothing_kept, picks


def write_run(folder, accuracy, speedup=None, ratio=None, structure="mlp", **arguments):
    folder.mkdir(parents=True)
    given = {
        "model": "models/net.py:net", "structure": structure, "unit_criterion": "joint",
        "criterion": "magnitude", "pattern": None, "compensate": None, "refit": None,
        "sparsity": 0.25,
    }  # fmt: skip
    report = {
        "arguments": {**given, **arguments},
        "sparsity": 0.5,
        "accuracy": {}
        if accuracy is None
        else {
            "before": {"accuracy": 0.9, "loss": 0.3, "samples": 1000},
            "after": {"accuracy": accuracy, "loss": 0.4, "samples": 1000},
        },
    }
    (folder / "report.json").write_text(json.dumps(report))
    if speedup is not None:
        measured = {
            "dense": {"dense_bytes": 1000, "packed_bytes": None},
            "pruned": {"dense_bytes": 900, "packed_bytes": int(1000 * ratio)},
            "timings": [
                {
                    "batch": batch, "dense": [0.01, 0.009, 0.011], "pruned": [0.008, 0.007, 0.009],
                    "speedup": [speedup, speedup - 0.1, speedup + 0.1],
                    "verdict": f"{speedup:.2f} times as fast",
                }
                for batch in (1, 16)
            ],
            "runtime": "torch",
            "machine": {"processor": "A processor", "threads": 2},
        }  # fmt: skip
        (folder / "measurement.json").write_text(json.dumps(measured))


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder / "a", 0.895, 1.3, 0.7)
    write_run(folder / "b", 0.892, 1.05, 0.3, structure=None)
    write_run(folder / "c", 0.7, 3.0, 0.2)
    write_run(folder / "d", 0.893)
    write_run(folder / "e", None)
    return folder


def test_what_is_read(runs):
    assert has_runs(runs)
    found = read_runs(runs)
    assert found.name == "runs"
    assert found.without_accuracy == ["e"]
    a, b, c, d = found.points
    assert (a.model, a.method) == ("net.py:net", "MLP units, joint")
    assert (a.sparsity, a.file_bytes) == (0.25, 700)
    assert (b.method, b.sparsity, b.file_bytes) == ("magnitude", 0.5, 300)
    assert [each.batch for each in a.latencies] == [1, 16]
    assert a.latencies[0].where == "torch, A processor, 2 threads"
    assert c.file_bytes == 200
    assert d.latencies == ()
    assert d.file_bytes is None


def test_picks(runs):
    points = read_runs(runs).points
    fastest, smallest = picks(points, margin=1)
    assert (fastest.point.name, smallest.point.name) == ("a", "b")
    assert "1.30 times as fast" in fastest.text
    assert smallest.text.startswith("0.30 of the file")
    (both,) = picks(points, margin=25)
    assert both.point.name == "c"
    assert picks(points, margin=0.1) == []
    assert nothing_kept(points, 0.1) == "No run loses 0.1 points or less; a loses 0.5."
    assert "none was measured" in nothing_kept([points[3]], 1)
    assert picks([points[3]], margin=1) == []


def test_a_run_that_is_not_faster_is_not_picked_for_speed(tmp_path):
    write_run(tmp_path / "slow", 0.9, 1.05, 1.2)
    (pick,) = picks(read_runs(tmp_path).points, margin=1)
    assert pick.text == "0.90 of the file: accuracy 90.0 after 90.0 %"


def test_the_pages(runs):
    pytest.importorskip("jinja2")
    done = CliRunner().invoke(main, ["report", str(runs)])
    assert done.exit_code == 0, done.output
    page = (runs / "report.html").read_text()
    assert page.count("<svg") == 3 + 2  # figures, and the marks of the legend
    assert page.count('class="ring"') == 2 * 3
    assert "<strong>a</strong>: 1.30 times as fast" in page
    assert "Without an accuracy, not shown: e." in page
    assert CliRunner().invoke(main, ["report", str(runs)]).exit_code != 0  # exists
    done = CliRunner().invoke(main, ["report", str(runs), "--format", "md"])
    text = (runs / "report.md").read_text()
    assert "| a | MLP units, joint | 25.0 | 89.5 | −0.50 |" in text
    done = CliRunner().invoke(main, ["report", str(runs), "--figures", "x", "--force"])
    assert "--figures requires the folder of a study" in done.output


def test_bad_files(tmp_path):
    write_run(tmp_path / "a", None)
    with pytest.raises(InvalidArgument, match="DIR must have runs with an accuracy"):
        read_runs(tmp_path)
    write_run(tmp_path / "b", 0.8)
    (tmp_path / "b" / "report.json").write_text('{"accuracy": {"after": 1}, "arguments": {}}')
    with pytest.raises(FileFormatError, match="is not a run"):
        read_runs(tmp_path)
