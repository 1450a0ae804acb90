from __future__ import annotations

import sys
from types import MappingProxyType, SimpleNamespace

import pytest

from fastsal.errors import InvalidArgument
from fastsal.utils import progress as module
from fastsal.utils.machine import peak_memory
from fastsal.utils.progress import in_notebook, reporter


def test_a_function_is_called_itself():
    seen = []
    with reporter(lambda done, total: seen.append((done, total)), "work") as report:
        report(1, 2)
        report(2, None)
    assert seen == [(1, 2), (2, None)]


def test_false_is_silent(capsys):
    with reporter(False, "work") as report:
        report(1, 2)
    assert capsys.readouterr() == ("", "")


def test_lines_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(module, "_LINE_EVERY", 0.0)
    with reporter(True, "statistics") as report:
        report(32, 64)
        report(64, 64)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("statistics: 32/64 samples, ")
    assert " left" in lines[0]
    assert "peak" in lines[-1]
    assert "64/64" in lines[-1]


def test_a_short_loop_writes_no_lines(capsys):
    with reporter(True, "statistics") as report:
        report(64, 64)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [64, None])
def test_a_bar_on_a_terminal(capsys, monkeypatch, total):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "140")
    with reporter(True, "statistics") as report:
        report(64, total)
    out, err = capsys.readouterr()
    assert out == ""
    assert "statistics" in err
    assert "samples/s" in err


class Shell:
    """The shell of a notebook, as IPython has it."""

    kernel = object()
    config = MappingProxyType({})


@pytest.mark.parametrize("total", [64, None])
def test_a_bar_in_a_notebook(capsys, monkeypatch, total):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=Shell))
    with reporter(True, "statistics") as report:
        report(0, total)
        report(32, total)
        report(64, total)
    err = capsys.readouterr().err
    assert "statistics" in err.splitlines()[-1]
    assert ("64/64" if total else "64 samples") in err.splitlines()[-1]


def test_a_terminal_of_ipython_is_no_notebook(monkeypatch):
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=SimpleNamespace))
    assert not in_notebook()


def test_an_error_inside_passes():
    with pytest.raises(ZeroDivisionError), reporter(True, "work"):
        raise ZeroDivisionError


def test_something_else_is_refused():
    with (
        pytest.raises(InvalidArgument, match="progress must be .*got 'yes'"),
        reporter("yes", "work"),
    ):
        pass


def test_peak_memory_is_in_bytes():
    most = peak_memory()
    assert most is None or most > 10 * 2**20
