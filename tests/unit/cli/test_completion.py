"""Completion of commands and options by click."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from fastsal.cli import main


def completed(words, start):
    found = ShellComplete(main, {}, "fastsal", "_FASTSAL_COMPLETE").get_completions(words, start)
    return [item.value for item in found]


@pytest.mark.parametrize(
    ("words", "start", "expected"),
    [
        ([], "sw", ["sweep"]),
        (["sweep"], "--dry", ["--dry-run"]),
        (["prune", "resnet50"], "--crit", ["--criterion"]),
        (["prune", "resnet50", "--scope"], "la", ["layer"]),
        (["inspect", "run"], "--fig", ["--figure"]),
    ],
)
def test_words_are_completed(words, start, expected):
    assert completed(words, start) == expected


def test_the_script_of_a_shell_is_printed_without_torch(python_env):
    code = (
        "import sys\nfrom fastsal.cli import main\n"
        "try:\n    main(prog_name='fastsal')\n"
        "except SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**python_env, "_FASTSAL_COMPLETE": "zsh_source"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "#compdef fastsal" in done.stdout
