"""Atomic writes: a file is written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from fastsal.errors import InvalidArgument
from fastsal.utils.paths import user_path
from fastsal.utils.sizes import gib

_STEM = 40  # characters of the name of the file in a temporary name
_recorded: ContextVar[list[Path] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it if the block succeeds.

    The content is on the disk before the new name is. Every call has a name of its own, also among
    threads, processes and machines that share the folder. The file has the permissions that the
    process gives to new files, whatever those are that its writer chose.

    Args:
        path: The file to write; missing parent folders are created.

    Yields:
        The path to write to, with the suffix of `path`.

    Raises:
        OSError: The folder is not writable, or the disk is full. The error names `path`, and an
            existing file is not changed.
    """
    target = user_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            # safetensors replaces the file by one that only its owner can read.
            with contextlib.suppress(OSError):  # a file system without permissions
                temporary.chmod(mode)
        sync_file(temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)
        note_written(target)
    except OSError as error:
        if error.filename not in (None, str(temporary)) or not error.errno:
            raise
        # Name the file of the caller instead of the temporary one.
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from None
    except Exception as error:
        if (number := error_number(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(target)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def error_number(error: BaseException) -> int | None:
    """Return the number of the error of the system that a library reports by one of its own.

    safetensors has it in its message; PyTorch raises another error while it handles that.
    """
    if found := re.search(r"I/O error: .*\(os error (\d+)\)", str(error)):
        return int(found[1])
    inner = error.__context__
    return inner.errno if isinstance(inner, OSError) and inner.filename is None else None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_new(path: str | os.PathLike[str], text: str) -> bool:
    """Write `text` as UTF-8 to `path` unless the file exists; return whether it was written.

    The file appears whole. Of several callers, also on machines that share the folder, one writes.

    Raises:
        OSError: The folder does not exist or is not writable, or the disk is full.
    """
    target = Path(path)
    temporary = temporary_beside(target)
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            sync_file(temporary)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from None
        try:
            os.link(temporary, target)
        except FileExistsError:
            # A network file system may have lost the answer to a call that it carried out.
            return temporary.stat().st_nlink == 2
        except OSError:  # a file system without hard links: the name appears before the content
            return _written_new(target, text)
        sync_folder(target.parent)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _written_new(target: Path, text: str) -> bool:
    try:
        file = target.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    with file:
        file.write(text)
    sync_file(target)
    return True


def temporary_beside(target: Path) -> Path:
    """Return an unused hidden path in the folder of `target`, with its suffix."""
    stem = target.stem[:_STEM]
    return target.with_name(f".{stem}.{secrets.token_hex(8)}.part{target.suffix}")


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system supports it."""
    with contextlib.suppress(OSError):  # not on Windows, nor on some network file systems
        place = os.open(path, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def check_writable(path: str | os.PathLike[str], argument: str, nbytes: int = 0) -> None:
    """Check that a file or a folder can be written later, without leaving anything behind.

    An existing parent folder is tried by a temporary file. Missing ones are not created.

    Args:
        path: The file or the folder to write.
        argument: Name of the argument that gave it, for the message.
        nbytes: Bytes that will be written.

    Raises:
        InvalidArgument: A file cannot be created there, or the disk has fewer bytes left.
    """
    shown = os.fspath(path)
    target = user_path(path).absolute()
    parent = target if target.is_dir() else target.parent
    try:
        while not parent.exists():
            parent = parent.parent
        probe = temporary_beside(parent / "check")
        with open(probe, "xb"):
            probe.unlink()
        free = shutil.disk_usage(parent).free
    except OSError as error:
        reason = f" ({error.strerror})" if error.strerror else ""
        raise InvalidArgument(
            f"{argument}: {shown} cannot be written: {parent} is not writable{reason}"
        ) from None
    if free < nbytes:
        raise InvalidArgument(
            f"{argument}: {shown} needs {gib(nbytes)} of free disk space, got {gib(free)} in "
            f"{parent}"
        )


@contextlib.contextmanager
def recording_writes() -> Iterator[list[Path]]:
    """Yield a list to which each file is appended that is written within the block."""
    written: list[Path] = []
    token = _recorded.set(written)
    try:
        yield written
    finally:
        _recorded.reset(token)


def note_written(path: Path) -> None:
    """Record a file that was written, see `recording_writes`."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(path)
