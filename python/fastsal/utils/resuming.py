"""Validation that a checkpoint belongs to the run that resumes from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.utils.atomic import check_writable
from fastsal.utils.warn import warn_user


def check_path(path: Path) -> None:
    """Check before the work that a checkpoint can be written to `path`.

    Raises:
        InvalidArgument: It is a folder, or cannot be written.
    """
    if path.is_dir():
        raise InvalidArgument(f"checkpoint must be a file, got the folder {path}")
    check_writable(path, "checkpoint")


def check_origin(
    path: Path,
    call: str,
    found: Mapping[str, Any],
    kind: str,
    start: str,
    asked: Mapping[str, Any],
) -> None:
    """Raise FileFormatError unless a checkpoint belongs to a run.

    Args:
        path: The checkpoint.
        call: Name of the function that resumes.
        found: `format`, `start` and `asked` of the checkpoint.
        kind: Expected format.
        start: Digest of the initial tensors of the run.
        asked: Arguments of the run, from `as_asked`.
    """
    if found.get("format") != kind:
        raise FileFormatError(f"checkpoint: {path} is not a checkpoint of {call}")
    if found["start"] != start:
        raise FileFormatError(
            f"checkpoint: {path} belongs to a run from other weights or of another model; pass "
            "another path"
        )
    if found["asked"] != asked:
        names = {*asked, *found["asked"]}
        other = sorted(k for k in names if found["asked"].get(k) != asked.get(k))
        raise FileFormatError(
            f"checkpoint: {path} belongs to a run with other values of {', '.join(other)}; "
            "pass the same arguments, or another path"
        )


# Checkpoints to be removed at the end of a block of `kept_until_written`.
_finished: ContextVar[list[Path] | None] = ContextVar("_finished", default=None)


@contextlib.contextmanager
def kept_until_written() -> Iterator[None]:
    """Keep the checkpoint of a run that is complete until the end of the block.

    The block measures and writes the result. If it raises or is killed, the checkpoint remains.
    """
    finished: list[Path] = []
    token = _finished.set(finished)
    try:
        yield
    finally:
        _finished.reset(token)
    for path in finished:
        remove_finished(path)


def remove_finished(path: Path, *, at_once: bool = False) -> None:
    """Remove the checkpoint of a run that is complete; a failure is a warning.

    Args:
        path: The checkpoint.
        at_once: Whether it is removed now, also within `kept_until_written`.
    """
    finished = _finished.get()
    if finished is not None and not at_once:
        finished.append(path)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warn_user(f"checkpoint: {path} cannot be removed ({error.strerror}); remove it by hand")


def as_asked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments after a round trip through JSON, to compare them with those of a file."""
    return dict(json.loads(json.dumps(dict(arguments), default=str)))
