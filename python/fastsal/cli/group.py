"""How errors leave the command: one line and a status, never a traceback for a known error."""

from __future__ import annotations

import errno
import warnings
from typing import Any

import click

from fastsal.errors import FastsalError

STATUS_ERROR = 2
STATUS_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Group(click.Group):
    """A click group that turns known errors into `error: ...` on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command.

        A `FastsalError`, or a file that cannot be opened or written, exits with 2; Ctrl-C with
        130. With `--debug`, and for any other exception, the traceback stays.
        """
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except (FastsalError, OSError) as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            if isinstance(error, OSError) and error.filename is None:
                raise
            click.echo(f"error: {one_line(error)}", err=True)
            ctx.exit(STATUS_ERROR)
        except KeyboardInterrupt:
            click.echo("interrupted: nothing was written", err=True)
            ctx.exit(STATUS_INTERRUPTED)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Write a warning in one line, without the place in the code."""
    click.echo(f"warning: {' '.join(str(message).split())}", err=True)


def one_line(error: BaseException) -> str:
    """Return the message of `error` without line breaks."""
    if isinstance(error, OSError) and not isinstance(error, FastsalError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
