from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fastsal.errors import InvalidArgument
from fastsal.pruning.training_checkpoint import TrainingCheckpoint
from fastsal.utils.atomic import (
    atomic_path,
    check_writable,
    recording_writes,
    write_new,
    write_text,
)
from fastsal.utils.presence import Presence


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_a_file_stays_what_it_was_where_the_block_fails(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def half_written():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        half_written()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", [None, "temporary", "other"])
def test_a_full_disk_is_said_by_the_name_of_the_file(name, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def full():
        with atomic_path(path) as temporary:
            filename = {None: None, "temporary": str(temporary), "other": "b.txt"}[name]
            raise OSError(errno.ENOSPC, "Error writing bytes", filename)

    with pytest.raises(OSError, match="b.txt" if name == "other" else "No space left") as caught:
        full()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == ("b.txt" if name == "other" else str(path))
    assert path.read_text() == "before"


def safetensors_error(_):
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    raise SafetensorError(message)


def torch_error(path):
    """As `torch.save`: closing its archive fails after a write failed."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    finally:
        raise RuntimeError("unexpected pos 64 vs 0")


@pytest.mark.parametrize("write", [safetensors_error, torch_error])
def test_a_full_disk_is_said_where_a_library_hides_it(write, tmp_path):
    def full():
        with atomic_path(tmp_path / "a.txt") as temporary:
            write(temporary)

    with pytest.raises(OSError, match="No space left") as caught:
        full()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a.txt")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_new_files_and_presences_name_their_place_on_a_full_disk(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            write_new(tmp_path / "a.txt", "x")
    assert caught.value.filename == str(tmp_path / "a.txt")
    monkeypatch.setattr("os.write", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        Presence(tmp_path)
    assert caught.value.filename == str(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_training_checkpoint_on_a_full_disk(tmp_path, monkeypatch):
    keeper = TrainingCheckpoint(tmp_path / "state", {}, {}, "finetune")
    opened = open

    def full(path, mode="r", *args, **kwargs):
        return opened("/dev/full" if mode == "wb" else path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="No space left") as caught:
        keeper.save({"tensors": {"a": torch.zeros(100_000)}})
    assert caught.value.filename == str(tmp_path / "state")


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_names_of_threads_do_not_collide(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_path(path) as one, atomic_path(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_long_names(tmp_path):
    path = tmp_path / ("x" * 240 + ".json")
    write_text(path, "{}")
    assert path.read_text() == "{}"


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """A crash of the machine leaves the old file or the new one, never an empty one."""
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(place):
        kind = "folder" if stat.S_ISDIR(os.fstat(place).st_mode) else "file"
        events.append((kind, os.fstat(place).st_size if kind == "file" else None))
        fsync(place)

    def renamed(source, target):
        events.append(("rename", None))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "a.txt", "four")
    assert events == [("file", 4), ("rename", None), ("folder", None)]


def test_what_cannot_be_written_is_told_beforehand(tmp_path, monkeypatch):
    check_writable(tmp_path / "deep" / "a.txt", "out")
    check_writable(tmp_path, "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match=r"^out: .*a\.txt cannot be written: .*file is not"):
        check_writable(tmp_path / "file" / "a.txt", "out")
    with pytest.raises(InvalidArgument, match="needs .* TiB of free disk space, got"):
        check_writable(tmp_path / "a.txt", "out", 2**60)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(InvalidArgument, match="is not writable .Read-only file system"):
        check_writable(tmp_path / "a.txt", "checkpoint")


def test_written_files_are_recorded(tmp_path):
    with recording_writes() as written:
        write_text(tmp_path / "a.txt", "x")
        with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "b.txt"):
            raise ZeroDivisionError
    write_text(tmp_path / "c.txt", "x")
    assert written == [tmp_path / "a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
def test_files_have_the_permissions_of_new_files(tmp_path):
    """Not those of a library that writes to a private file, such as safetensors."""
    (tmp_path / "new").touch()
    with atomic_path(tmp_path / "a.safetensors") as temporary:
        save_file({"a": np.zeros(1)}, temporary)
    with atomic_path(tmp_path / "b.txt") as temporary:
        temporary.write_text("x")
        temporary.chmod(0o600)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1
