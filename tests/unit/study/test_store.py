from __future__ import annotations

import errno
import json
import os

import pyarrow.parquet
import pytest

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.study import tables
from fastsal.study.folder_format import RESULTS
from fastsal.study.store import Store, differences
from fastsal.study.tables import write_table

IDENTITY = {"name": "a", "split": {"prune": 0.3, "fit": 0.7}, "tasks": [{"name": "x"}]}


def test_a_cell_is_kept_and_read_again(tmp_path):
    store = Store(tmp_path / "out", IDENTITY)
    assert store.read("c-1") is None
    store.write("c-1", {"status": "done", "value": float("nan")})
    again = Store(tmp_path / "out", IDENTITY)
    assert again.read("c-1") == {"status": "done", "value": None, "key": "c-1"}


def test_a_damaged_cell_counts_as_not_done(tmp_path):
    store = Store(tmp_path, IDENTITY)
    store.write("c", {"status": "done"})
    path = tmp_path / "cells" / "c.json"
    whole = path.read_text()
    for text in ("", whole[:-5], "[]", whole.replace('"c"', '"d"')):
        path.write_text(text)
        assert store.read("c") is None


def test_the_folder_of_another_study_is_refused_and_left_as_it_was(tmp_path):
    store = Store(tmp_path, IDENTITY)
    store.write("c", {"status": "done"})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = {**IDENTITY, "split": {"prune": 0.5, "fit": 0.5}}
    with pytest.raises(
        InvalidArgument, match=r"another study \(different settings: split.fit, split.pr"
    ):
        Store(tmp_path, other)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(
        InvalidArgument, match="must be an empty folder or the results folder of this study"
    ):
        Store(tmp_path, IDENTITY)
    with pytest.raises(InvalidArgument, match="out must be a folder, got the file"):
        Store(tmp_path / "thesis.tex", IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "not valid JSON"), ("{}", "damaged"), ("[1]", "damaged"), ('{"format": 1}', "damaged")],
)
def test_a_damaged_identity_is_said(text, said, tmp_path):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(FileFormatError, match=f"study.json is {said}"):
        Store(tmp_path, IDENTITY)


def test_the_identity_survives_a_description(tmp_path):
    store = Store(tmp_path, IDENTITY)
    store.describe({"name": "a", "seconds": 1.0})
    assert json.loads((tmp_path / "study.json").read_text())["identity"] == IDENTITY
    Store(tmp_path, IDENTITY)


def test_a_full_disk_is_said_by_the_file_and_loses_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path, IDENTITY)
    store.write("c", {"status": "done"})

    def full(temporary, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*cells/d.json'"):
        store.write("d", {"status": "done"})
    monkeypatch.undo()
    assert store.read("c") is not None
    assert store.read("d") is None
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["c.json"]


def test_differences_are_named():
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}], "c": 1}) == ["a[1].b", "c"]
    assert differences({"a": [1]}, {"a": [1, 2]}) == ["a"]


def test_both_tables_hold_the_same_and_floats_come_back_exactly(tmp_path):
    row = dict.fromkeys(RESULTS)
    row |= {"study": "a, b", "cell": 'x"y', "seed": 3, "dense": 0.1 + 0.2, "pruned": 1 / 3}
    write_table(tmp_path, "results", RESULTS, [row, dict.fromkeys(RESULTS, None)])
    (first, second) = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert first == row
    assert set(second.values()) == {None}
    import csv

    with (tmp_path / "results.csv").open(newline="") as file:
        (one, two) = csv.DictReader(file)
    assert one == {k: "" if v is None else str(v) for k, v in row.items()}
    assert float(one["dense"]) == 0.1 + 0.2
    assert set(two.values()) == {""}


def test_a_table_that_cannot_be_written_stays_what_it_was(tmp_path, monkeypatch):
    write_table(tmp_path, "results", {"a": int}, [{"a": 1}])
    before = (tmp_path / "results.csv").read_bytes()
    monkeypatch.setattr(tables.csv, "writer", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_table(tmp_path, "results", {"a": int}, [{"a": 2}])
    assert (tmp_path / "results.csv").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.csv", "results.parquet"]


def test_columns_that_a_report_reads_are_those_that_a_study_writes():
    import dataclasses

    from fastsal.study.folder_format import LAYERS, LOSS_LINE, OVERLAP
    from fastsal.study.report import results

    kinds = {
        results.Row: RESULTS, results.Failure: RESULTS, results.Layer: LAYERS,
        results.LossLine: LOSS_LINE, results.Overlap: OVERLAP,
    }  # fmt: skip
    for kind, columns in kinds.items():
        for field in dataclasses.fields(kind):
            if field.name == "peak_memory_bytes":  # of older tables
                continue
            assert columns[field.name].__name__ == str(field.type).removesuffix(" | None")
