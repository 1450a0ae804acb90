"""Of all processes one has a claim, also on a name whose process was killed."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from fastsal.utils import claims as module
from fastsal.utils.claims import Claims
from fastsal.utils.presence import SILENCE

NAMES = [f"model-r1-s0-0.{i}-abc" for i in range(12)]


def left_by_killed(folder, names, number=1):
    for name in names:
        (folder / f".{name}.{number}.claim").write_text('{"worker": "gone"}')


def test_a_name_has_one_claim_until_it_is_finished(tmp_path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a.b")
        assert not second.take("a.b")
        assert not first.take("a.b")
        assert (first.is_mine("a.b"), second.is_mine("a.b")) == (True, False)
        (claim,) = second.all().values()
        assert claim.is_held
        assert second.describe(claim).startswith(f"process {os.getpid()} on ")
        first.finish("a.b")
        assert not first.is_mine("a.b")
        assert second.take("a.b")  # who takes it sees then that the work is stored
        second.finish("a.b")
    assert list(tmp_path.iterdir()) == []


def test_a_released_name_can_be_taken_by_any_process(tmp_path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a")
        first.release("a")
        assert second.take("a")
        assert second.all()["a"].number == 2
        assert not first.take("a")
        second.finish("a")
        assert first.all() == {}


def test_the_end_of_a_block_releases_what_is_not_finished(tmp_path):
    def interrupted():
        with Claims(tmp_path) as first:
            assert first.take("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with Claims(tmp_path) as second:
        assert not second.all()["a"].is_held
        assert second.take("a")
        second.finish("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("killed", [0, 1, 3])
@pytest.mark.parametrize("has_links", [True, False])
def test_each_name_is_taken_once_by_many(killed, has_links, tmp_path, monkeypatch):
    if not has_links:

        def unsupported(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", unsupported)
    for number in range(1, killed + 1):
        left_by_killed(tmp_path, NAMES, number)

    def work(i: int) -> list[str]:
        names = NAMES[i:] + NAMES[:i]
        with Claims(tmp_path) as mine:
            taken = [name for name in names if mine.take(name)]
            assert all(mine.is_mine(name) for name in taken)
            barrier.wait(60)  # all of them still have their claims
            for name in taken:
                mine.finish(name)
        return taken

    barrier = Barrier(6)
    with ThreadPoolExecutor(6) as pool:
        taken = [name for names in pool.map(work, range(6)) for name in names]
    assert sorted(taken) == sorted(NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_slept_has_lost_its_claim(tmp_path, monkeypatch):
    with Claims(tmp_path) as slept, Claims(tmp_path) as other:
        assert slept.take("a")
        monkeypatch.setattr(module.Watch, "is_alive", lambda *_: False)
        assert other.take("a")
        monkeypatch.undo()
        assert not slept.is_mine("a")
        slept.finish("a")
        slept.release("a")
        assert other.is_mine("a")
        other.finish("a")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_is_not_written_yet_is_held_for_a_while(tmp_path):
    """Without hard links the name is there before the content, and a process may be killed then."""
    (tmp_path / ".a.1.claim").touch()
    now = [0.0]
    with Claims(tmp_path, clock=lambda: now[0]) as claims:
        looks = 0
        while claims.all()["a"].is_held:
            now[0] += 5
            looks += 1
        assert looks == SILENCE / 5
        assert claims.take("a")
        claims.finish("a")


def test_what_killed_processes_left_is_cleared(tmp_path):
    left_by_killed(tmp_path, ["done", "open"])
    (tmp_path / ".gone.worker").write_text("{}")
    with Claims(tmp_path) as claims:
        claims.clear(["done"])
        assert set(claims.all()) == {"open"}
        assert sum(p.suffix == ".worker" for p in tmp_path.iterdir()) == 2  # one may be far away


def test_a_network_may_lose_the_answer_of_a_link(tmp_path, monkeypatch):
    link = os.link

    def twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    with Claims(tmp_path) as claims:
        assert claims.take("a")
        claims.finish("a")
