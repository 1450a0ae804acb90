"""The live table of a sweep, from the status of a study."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from fastsal.cli.live import LiveTable
from fastsal.study.cells import cells_of
from fastsal.study.settings.fields import Reader
from fastsal.study.settings.reading import study_of
from fastsal.study.status import Best, Status

TABLE = {
    "name": "small",
    "models": [{"model": "a"}],
    "tasks": [{"name": "seen", "data": "x.npz"}, {"name": "unseen", "data": "y.npz"}],
    "sources": [{"tasks": "seen"}],
    "criteria": [{"criterion": "obs-greedy"}, {"criterion": "magnitude"}],
    "sparsities": [0.5, 0.9],
}


def result(seen, unseen, tuned=None):
    return {
        "status": "done",
        "tasks": [
            {"role": "source", "pruned": seen, "tuned": tuned},
            {"role": "transfer", "pruned": unseen, "tuned": tuned and unseen},
        ],
    }


@pytest.fixture
def status():
    cells = cells_of(study_of(Reader(TABLE)))
    found = [result(0.9, 0.7), None, result(0.95, 0.6), {"status": "failed", "tasks": [{}]}]
    results = {cell.key: r for cell, r in zip(cells, found)}
    return Status("small", cells, results, 3, 1, cells[1], {cells[2].key: "process 7 on far"})


def shown(table):
    screen = Console(file=io.StringIO(), width=160)
    screen.print(table.render())
    return screen.file.getvalue()


def test_the_best_is_best_on_unseen_tasks(status):
    assert status.best() == [
        Best("a", 0.5, 2, 2, "obs-greedy", 0.9, 0.7),
        Best("a", 0.9, 1, 2),
    ]
    assert status.failed == 1


def test_fine_tuned_accuracies_count_where_there_are_any(status):
    results = {**status.results, status.cells[0].key: result(0.1, 0.2, tuned=0.8)}
    (first, _) = dataclasses.replace(status, results=results).best()
    assert (first.criterion, first.source, first.unseen) == ("magnitude", 0.95, 0.6)


def test_the_table_has_cells_time_and_the_best(status):
    now = [100.0]
    table = LiveTable(Console(file=io.StringIO()), clock=lambda: now[0])
    assert "opening" in shown(table)
    table(status)
    now[0] += 120
    text = shown(table)
    assert "small: 3/4 cells, 2:00, 1:00 left, 1 failed" in text
    assert "now: a, seen, obs-greedy, seed 0, sparsity 0.9" in text
    assert "(process 7 on far)" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["0.5", "2/2", "obs-greedy", "0.900", "0.700"] in lines
    assert ["0.9", "1/2"] in lines
    table(dataclasses.replace(status, here=None))
    assert "waiting for other processes; others: " in shown(table)


def test_it_is_drawn_in_a_block(status):
    screen = Console(file=io.StringIO(), width=160, force_terminal=True)
    with LiveTable(screen) as table:
        table(status)
    assert "obs-greedy" in screen.file.getvalue()
