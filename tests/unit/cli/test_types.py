"""Values of options that are refused in one line, before anything is opened."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from fastsal.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", ""), "--data must be a path, got ''"),
        (("--out", "", "--force"), "--out must be a path, got ''"),
        (("--weights", ""), "--weights must not be empty, got ''"),
        (("--class-map", ""), "--class-map must not be empty, got ''"),
        (("--size", "²"), "--size must be pixels as 96, height x width as 64x96"),
        (("--seed", "-1"), "--seed must be an integer in [0, 9223372036854775807], got -1"),
        (("--seed", str(2**63)), "--seed must be an integer in [0, 9223372036854775807], got 9223"),
        (
            ("--threads", str(2**40)),
            "--threads must be an integer in [1, 65536], got 1099511627776",
        ),
        (("--threads", "0"), "--threads must be an integer in [1, 65536], got 0"),
        (("--rounds", "0"), "--rounds must be an integer of at least 1, got 0"),
    ],
)
def test_a_value_that_cannot_be(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what an empty path would be
    given = {"--data": "images", "--sparsity": "0.5", "--out": "run", words[0]: words[1]}
    options = [word for pair in given.items() for word in pair]
    result = CliRunner().invoke(main, ["prune", "resnet18", *options, *words[2:]])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []
