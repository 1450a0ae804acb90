"""Run a command in a test, and check how it reports invalid input."""

from __future__ import annotations

from click.testing import CliRunner

from fastsal.cli import main


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fastsal")


def failed(result, message):
    """Check for one line on stderr, status 2, and no traceback."""
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0], errors[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""
