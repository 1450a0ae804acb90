"""One run at a time has a folder; the lock of a killed run does not count."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from fastsal.errors import InvalidArgument
from fastsal.utils.locks import LOCK_FILE, locked

HOLDER = """
import sys, time
from pathlib import Path
from fastsal.utils.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path, python_env):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=python_env,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_ends(holder, tmp_path):
    said = f"^out: .* is in use by another run .process {holder.pid} on {platform.node()}.; wait"
    with pytest.raises(InvalidArgument, match=said), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()
    holder.communicate()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_stale(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_thread_is_refused_too(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(InvalidArgument, match=f"process {os.getpid()} on"),
        locked(tmp_path),
    ):
        pass


def test_an_error_releases_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("owner", "is_free"),
    [
        (json.dumps({"pid": os.getpid(), "host": platform.node()}), False),
        (json.dumps({"pid": 4194305, "host": platform.node()}), True),  # Linux has none so large
        (json.dumps({"pid": 1, "host": "elsewhere"}), False),
        ("", True),
        ("half", True),
    ],
)
def test_file_systems_without_locks(owner, is_free, tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / LOCK_FILE).write_text(owner)
    if is_free:
        with locked(tmp_path), pytest.raises(InvalidArgument), locked(tmp_path):
            pass
        return
    with pytest.raises(InvalidArgument, match="is in use by another run"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == owner
