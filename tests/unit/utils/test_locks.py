"""The system releases the lock of a process that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fastsal.utils.locks import is_locked, lock

HOLDER = """
import os, sys
from fastsal.utils.locks import lock
assert lock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)) is True
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def opened(tmp_path):
    places = []

    def open_again() -> int:
        places.append(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT))
        return places[-1]

    yield open_again
    for place in places:
        os.close(place)


def test_one_open_file_has_the_lock(opened):
    first, second = opened(), opened()
    assert is_locked(second) is False
    assert lock(first) is True
    assert lock(second) is False
    assert is_locked(second) is True
    os.close(os.dup(second))  # of another file: no matter
    assert is_locked(second) is True


def test_looking_leaves_it_free(opened):
    first, second = opened(), opened()
    assert [is_locked(first), is_locked(second), is_locked(first)] == [False] * 3
    assert lock(second) is True


def test_the_lock_of_a_killed_process_is_free(opened, tmp_path, python_env):
    place = opened()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "file")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=python_env,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    assert is_locked(place) is True
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert is_locked(place) is False


@pytest.mark.skipif(sys.platform == "win32", reason="flock of POSIX")
def test_file_systems_without_locks(opened, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    place = opened()
    assert lock(place) is None
    assert is_locked(place) is None
