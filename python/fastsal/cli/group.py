"""How errors leave the command: one line and a status, never a traceback for a known error."""

from __future__ import annotations

import contextlib
import errno
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from fastsal.errors import FastsalError
from fastsal.utils.atomic import recording_writes
from fastsal.utils.plain_text import plain_line

STATUS_ERROR = 2
STATUS_INTERRUPTED = 130  # 128 + SIGINT, the convention of shells


class Group(click.Group):
    """A click group that reports known errors as one line, `error: ...`, on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of the commands in the order in which they were added."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options before the name of a command; an invalid one exits with 2."""
        if not args:
            return super().parse_args(ctx, args)  # shows the help
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _exit_with(ctx, usage_line(error))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command.

        An invalid option, a `FastsalError`, a core that cannot be imported, or a file that cannot
        be opened or written exits with 2; Ctrl-C with 130. With `--debug`, and for any other
        exception, the traceback is shown.
        """
        before, warnings.showwarning = warnings.showwarning, _show_warning
        with contextlib.ExitStack() as stack:
            # A process that calls the command from Python keeps its own.
            stack.callback(setattr, warnings, "showwarning", before)
            written = stack.enter_context(recording_writes())
            return self._invoked(ctx, written)

    def _invoked(self, ctx: click.Context, written: list[Path]) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _exit_with(ctx, usage_line(error))
        except (FastsalError, OSError) as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            if not isinstance(error, FastsalError) and error.filename is None:
                raise
            _exit_with(ctx, one_line(error))
        except ImportError as error:
            # The compiled core: it is missing, or refuses the instruction set that was asked for.
            if ctx.params.get("debug") or error.name != "fastsal._core":
                raise
            _exit_with(ctx, one_line(error))
        except KeyboardInterrupt:
            click.echo(f"interrupted: {_written(written)}", err=True)
            ctx.exit(STATUS_INTERRUPTED)


def _written(paths: list[Path]) -> str:
    """Return which files of an interrupted command exist."""
    there = list(dict.fromkeys(str(path) for path in paths if path.exists()))
    if not there:
        return "nothing was written"
    others = f" and {len(there) - 1} more" if len(there) > 1 else ""
    return f"{there[-1]}{others} written before"


def usage_line(error: click.UsageError) -> str:
    """Return what is wrong with a command line, and the command whose help says what is right."""
    if isinstance(error, click.MissingParameter) and error.param is not None:
        text = f"{_option(error.param)} is required"
    elif isinstance(error, click.BadParameter) and error.param is not None:
        text = f"{_option(error.param)} {error.message}"
    else:
        text = " ".join(error.format_message().split())
        text = text[:1].lower() + text[1:].rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "fastsal"
    return f"{text} (see {path} --help)"


def one_line(error: BaseException) -> str:
    """Return the message of `error` without line breaks and escape codes."""
    if isinstance(error, OSError) and not isinstance(error, FastsalError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return plain_line(error, None) or type(error).__name__


def _option(param: click.Parameter) -> str:
    """Return the first long spelling of an option, as its help has it, or an argument's name."""
    if isinstance(param, click.Argument):
        return param.human_readable_name
    return next((opt for opt in param.opts if opt.startswith("--")), param.opts[0])


def _exit_with(ctx: click.Context, message: str) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    ctx.exit(STATUS_ERROR)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Write a warning in one line, without its place in the code."""
    click.echo(f"warning: {plain_line(message, None)}", err=True)
