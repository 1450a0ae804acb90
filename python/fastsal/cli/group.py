"""How errors leave the command: one line and a status, never a traceback for a known error."""

from __future__ import annotations

import contextlib
import errno
import io
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from fastsal.cli.torchrun import world_size
from fastsal.errors import FastsalError
from fastsal.utils.atomic import recording_writes
from fastsal.utils.plain_text import plain_line
from fastsal.utils.resuming import kept_until_written
from fastsal.utils.sizes import gib

STATUS_ERROR = 2
STATUS_INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
STATUS_TERMINATED = 143  # 128 + SIGTERM
_MEMORY = ("--size", "--batch-size", "--memory-budget")
_BYTES = re.compile(r"tried to allocate (\d+) bytes")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Terminated(BaseException):
    """SIGTERM, which job schedulers send before the time of a job is over."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM in the block, so temporary files and claims are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(stop: BaseException) -> int:
    """Return the exit status after Ctrl-C or SIGTERM."""
    return STATUS_TERMINATED if isinstance(stop, Terminated) else STATUS_INTERRUPTED


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
        be opened or written exits with 2; Ctrl-C with 130, SIGTERM with 143. With `--debug`, and
        for any other exception, the traceback is shown.
        """
        before, warnings.showwarning = warnings.showwarning, _show_warning
        with contextlib.ExitStack() as stack:
            # A process that calls the command from Python keeps its own.
            stack.callback(setattr, warnings, "showwarning", before)
            stack.enter_context(_any_character())
            written = stack.enter_context(recording_writes())
            stack.enter_context(kept_until_written())
            if world_size() == 1:  # a rank that waits for others in PyTorch would not end
                stack.enter_context(terminable())
            return self._invoked(ctx, written)

    def _invoked(self, ctx: click.Context, written: list[Path]) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _exit_with(ctx, usage_line(error))
        except (FastsalError, OSError) as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            # That of a file, or a lost connection of fastsal's own, which is an OSError too.
            is_told = isinstance(error, FastsalError) or error.filename is not None
            if not is_told and getattr(error, "errno", None) not in _FULL:
                raise
            _exit_with(ctx, one_line(error))
        except ImportError as error:
            # The compiled core: it is missing, or refuses the instruction set that was asked for.
            if ctx.params.get("debug") or error.name != "fastsal._core":
                raise
            _exit_with(ctx, one_line(error))
        except (MemoryError, RuntimeError) as error:
            if ctx.params.get("debug") or not is_out_of_memory(error):
                raise
            _exit_with(ctx, self._out_of_memory(ctx, error))
        except (KeyboardInterrupt, Terminated) as stop:
            click.echo(f"interrupted: {_written(written)}", err=True)
            ctx.exit(status_of(stop))

    def _out_of_memory(self, ctx: click.Context, error: BaseException) -> str:
        """Return how much memory was asked for, and which options of the command need less."""
        command = self.commands.get(ctx.invoked_subcommand or "")
        names = [name for param in command.params for name in param.opts] if command else []
        less = [name for name in _MEMORY if name in names]
        asked = _BYTES.search(str(error))
        found = f" for {gib(int(asked[1]))}" if asked else ""
        return f"there is not enough memory{found}" + (
            f"; a smaller {' or '.join(less)} needs less" if less else ""
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was exhausted; that of the CPU is an error of no type of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # of torch, which may not be imported
        or "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def _any_character() -> Iterator[None]:
    """Print a question mark for what the encoding of the output lacks, such as bars in ASCII."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [(stream, stream.errors) for stream in streams if stream.errors == "strict"]
    for stream, _ in before:
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError):  # what is left in its buffer does not fit on a disk
                stream.reconfigure(errors=errors)


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
        if error.filename is None:  # that of standard output, or of a file of a library
            return f"the output cannot be written: {error.strerror}"
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
