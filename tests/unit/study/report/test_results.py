"""Reading the folder of a study, and what is said of one that cannot be read."""

from __future__ import annotations

import json

import pytest

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.study.report.results import read_results

from .study_folder import change_table, read_table, write_study


@pytest.fixture
def folder(tmp_path):
    return write_study(tmp_path / "study", diagnostics=True, failed=[("magnitude", 0.9, 1)])


def test_rows_are_those_of_the_file(folder):
    results = read_results(folder)
    written = read_table(folder / "results.csv")
    assert len(results.rows) + len(results.failures) == len(written)
    assert len(results.failures) == 1
    for row, text in zip(results.rows, (r for r in written if r["status"] == "done"), strict=True):
        assert row.pruned == float(text["pruned"])
        assert (row.task, row.role, row.seed) == (text["task"], text["role"], int(text["seed"]))
    assert len(results.layers) == len(read_table(folder / "layers.csv"))
    assert len(results.loss_lines) == len(read_table(folder / "loss_line.csv"))
    assert any(row.eigenspace is None for row in results.overlaps)


def test_empty_fields_are_missing_numbers(tmp_path):
    results = read_results(write_study(tmp_path, tuned=False))
    assert {row.tuned for row in results.rows} == {None}
    assert {row.seconds_finetune for row in results.rows} == {None}


def test_columns_of_other_versions_are_passed_over_or_done_without(folder):
    def change(rows):
        return [{**{k: v for k, v in row.items() if k != "peak_memory_bytes"}, "new": "x"}
                for row in rows]  # fmt: skip

    change_table(folder / "results.csv", change)
    assert {row.peak_memory_bytes for row in read_results(folder).rows} == {None}


def test_criteria_stand_in_the_order_of_the_study_and_rounds_are_named(tmp_path):
    order = ("random", "obs-greedy", "magnitude")
    results = read_results(write_study(tmp_path, criteria=order, rounds=(1, 4)))
    assert [m.label for m in results.variants.values()] == [
        f"{c}, {r}" for c in order for r in ("1 round", "4 rounds")
    ]
    assert [m.index for m in results.variants.values()] == list(range(6))


def edit(column, value):
    def change(rows):
        rows[0][column] = value

    return change


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("dense", "high", "line 2: dense must be a number, got 'high'"),
        ("dense", "", "line 2: dense must be a number, got ''"),
        ("pruned", "91.6", "line 2: pruned must be in [0, 1], got '91.6'"),
        ("pruned", "nan", "line 2: pruned must be finite, got 'nan'"),
        ("seed", "1.5", "line 2: seed must be an integer, got '1.5'"),
        ("role", "target", "line 2: role must be source or transfer, got 'target'"),
        ("status", "begun", "line 2: status must be done or failed, got 'begun'"),
    ],
)
def test_a_bad_field_is_named(folder, column, value, message):
    change_table(folder / "results.csv", edit(column, value))
    with pytest.raises(FileFormatError) as caught:
        read_results(folder)
    assert message in str(caught.value)
    assert "results.csv" in str(caught.value)


def test_a_task_that_stands_twice_is_refused(folder):
    change_table(folder / "results.csv", lambda rows: [rows[0], *rows])
    with pytest.raises(FileFormatError, match="is duplicated"):
        read_results(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.csv", "study,cell\na,b\n", "column 'model' is missing"),
        ("results.csv", "", "column 'cell' is missing"),
        ("study.json", "{", "not valid JSON"),
        ("study.json", "[]", "format must be 1, got None"),
        ("study.json", '{"format": 2}', "format must be 1, got 2"),
        ("layers.csv", "model\nresnet20\n", "layers.csv: column 'source' is missing"),
    ],
)
def test_a_damaged_file_is_named(folder, name, text, message):
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError) as caught:
        read_results(folder)
    assert message in str(caught.value)


def test_a_table_cut_short_is_refused(folder):
    path = folder / "results.csv"
    text = path.read_text(encoding="utf-8").rstrip()
    path.write_text(text[: text.rindex(",")] + "\n", encoding="utf-8")
    with pytest.raises(FileFormatError, match="must have 28 fields, got 27"):
        read_results(folder)


def test_a_table_without_rows_is_refused(folder):
    path = folder / "results.csv"
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(FileFormatError, match="no rows"):
        read_results(folder)


def test_other_folders_are_told_apart(tmp_path):
    with pytest.raises(InvalidArgument, match="does not exist"):
        read_results(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="is a file"):
        read_results(tmp_path / "file")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(InvalidArgument, match=r"has no study\.json$"):
        read_results(run)
    (run / "masks.safetensors").touch()
    with pytest.raises(InvalidArgument, match="the output of `fastsal prune`"):
        read_results(run)


def test_a_study_that_is_not_done_says_how_it_goes_on(folder):
    (folder / "results.csv").unlink()
    with pytest.raises(InvalidArgument, match="has not finished; rerun"):
        read_results(folder)


def test_what_the_study_does_not_say_is_left_out(folder):
    (folder / "study.json").write_text(json.dumps({"format": 1}), encoding="utf-8")
    results = read_results(folder)
    assert results.name == "second-order transfer"
    assert results.settings == {}
    assert results.prunable("resnet20") is None


def test_a_folder_is_a_path_or_a_string(folder):
    assert read_results(str(folder)).rows == read_results(folder).rows
    assert repr(read_results(folder)).startswith("Results('second-order transfer', 176 rows, 1 f")


def test_a_report_needs_no_torch(folder, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from fastsal.study.report import markdown, html; "
        "from fastsal.study.report.results import read_results; "
        f"markdown.page(read_results({str(folder)!r})); "
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
