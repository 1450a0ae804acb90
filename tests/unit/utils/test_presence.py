"""Who is there and who is gone, on one machine by locks and on others by heartbeats."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from fastsal.utils import presence
from fastsal.utils.presence import SILENCE, Presence, Watch, path_of, tokens_in

HOLDER = """
import os, sys, time
from pathlib import Path
from fastsal.utils.presence import Presence
there = Presence(Path(sys.argv[1]))
if "fork" in sys.argv:
    r, w = os.pipe()
    if not os.fork():
        os.write(w, b"x")
        time.sleep(600)  # a worker of a data loader, whose parent is killed
    os.read(r, 1)  # it runs, and has closed what it inherited
print(there.token, flush=True)
sys.stdin.read()
"""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def there(tmp_path):
    found = Presence(tmp_path)
    yield found
    found.close()


def elsewhere(folder, token, **facts):
    """Make a presence that of another machine, whose locks are not seen here."""
    (folder / f".{token}.worker").write_text(
        json.dumps({"beat": "0", "pid": 1, "host": "far", "kernel": "other", "device": 1, **facts})
    )


def test_a_presence_is_seen_until_it_is_closed(there, tmp_path):
    watch = Watch(tmp_path)
    assert tokens_in(tmp_path) == [there.token]
    assert watch.is_alive(there.token)
    assert watch.described(there.token).startswith(f"process {os.getpid()} on ")
    there.close()
    there.close()
    assert not watch.is_alive(there.token)
    assert watch.described(there.token) == "an unknown process"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["fork"]])
def test_a_killed_process_is_gone_at_once_on_its_own_machine(more, tmp_path, python_env):
    if more and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), *more],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=python_env,
        start_new_session=True,
    )  # fmt: skip
    token = process.stdout.readline().strip()
    watch = Watch(tmp_path)
    assert watch.is_alive(token)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not watch.is_alive(token)
    if more:
        os.killpg(process.pid, signal.SIGKILL)  # the child


def test_a_stopped_process_is_there_as_long_as_it_has_the_lock(there, tmp_path, monkeypatch):
    clock = Clock()
    watch = Watch(tmp_path, clock)
    monkeypatch.setattr(Presence, "beat", lambda self: None)
    for _ in range(100):
        clock.now += 10
        assert watch.is_alive(there.token)


def test_on_another_machine_the_heartbeat_counts(tmp_path):
    clock = Clock()
    watch = Watch(tmp_path, clock)
    elsewhere(tmp_path, "a")
    elsewhere(tmp_path, "b")
    for beat in range(100):
        elsewhere(tmp_path, "b", beat=str(beat))
        assert watch.is_alive("a") == (clock.now < SILENCE)
        assert watch.is_alive("b")
        clock.now += 5
    assert "process 1 on far, no sign of life for " in watch.described("a")
    elsewhere(tmp_path, "a", beat="1")  # it only slept
    assert watch.is_alive("a")


def test_an_observer_that_slept_takes_nobody_for_gone(tmp_path):
    clock = Clock()
    watch = Watch(tmp_path, clock)
    elsewhere(tmp_path, "a")
    assert watch.is_alive("a")
    clock.now += 1e6
    assert watch.is_alive("a")


def test_the_lock_counts_only_within_one_mounted_file_system(tmp_path):
    """Containers of one kernel may see one folder through two mounts, with locks for each."""
    device = os.stat(tmp_path).st_dev
    watch = Watch(tmp_path)
    elsewhere(tmp_path, "here", kernel=presence.kernel(), device=device)
    elsewhere(tmp_path, "mount", kernel=presence.kernel(), device=device + 1)
    assert not watch.is_alive("here")
    assert watch.is_alive("mount")


def test_file_systems_without_locks_have_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "lock", lambda _: None)
    monkeypatch.setattr(presence, "is_locked", lambda _: None)
    clock = Clock()
    watch = Watch(tmp_path, clock)
    there = Presence(tmp_path)
    try:
        for _ in range(100):
            there.beat()
            clock.now += 5
            assert watch.is_alive(there.token)
        monkeypatch.setattr(Presence, "beat", lambda self: None)
        alive = []
        for _ in range(100):
            clock.now += 5
            alive.append(watch.is_alive(there.token))
        assert alive[0]
        assert not alive[-1]
    finally:
        there.close()


def test_a_forked_child_does_not_remove_it(there, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    there.close()
    monkeypatch.undo()
    assert path_of(tmp_path, there.token).exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        Presence(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
