"""Ctrl-C: calls of the core end early, and nothing is left half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from fastsal.utils.interrupts import uninterrupted

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX"),
    pytest.mark.usefixtures("ctrl_c"),
]


def test_a_step_in_place_runs_to_its_end():
    done = []

    def step():
        with uninterrupted():
            done.append("before")
            os.kill(os.getpid(), signal.SIGINT)
            done.append("after")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["before", "after"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_fails_still_restores_the_handler():
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_leave_the_handler():
    def step():
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    found = []
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


# A call of the core, where Python code would be interrupted.
FIRST_CALL = """
import sys
import numpy as np
import fastsal._core as core

def interrupt(frame, event, arg):
    if event == "call":
        raise KeyboardInterrupt

if sys.argv[1:]:
    __import__(sys.argv[1])
scores = np.zeros(4, np.float32)
sys.setprofile(interrupt)
core.count_keys(scores)
sys.setprofile(None)
print("done")
"""


@pytest.mark.parametrize("room", ["fastsal.fisher", "fastsal.pruning", ""])
def test_the_first_call_runs_no_python(python_env, room):
    command = [sys.executable, "-c", FIRST_CALL, *([room] if room else [])]
    done = subprocess.run(command, env=python_env, capture_output=True, text=True, check=False)
    # Without a room the test is one that can fail.
    assert (done.stdout == "done\n") is bool(room), done.stderr


# Calls that would take many minutes: the same parameter again and again.
CALLS = """
import sys, threading
import numpy as np
import fastsal._core as core

rng = np.random.default_rng(0)
d, block, times = 4096, 256, 20_000
rows = rng.standard_normal((300, d), dtype=np.float32)
packed, sums = np.empty(core.packed_len(d, block), np.float32), np.zeros(d, np.float32)
core.accumulate(rows, "float32", block, packed, sums, True)
weights = rng.standard_normal(d, dtype=np.float32)
one = (packed, d, 300.0, None)
kept = weights > 0

def call(name, times):
    some, theta = [one] * times, [weights] * times
    shapes = [(4, d // 4, 1)] * times
    if name == "eliminate":
        return core.eliminate(some, theta, block, 0.1)
    if name == "inverse_diagonal":
        return core.inverse_diagonal(some, block, 0.1)
    if name == "compensate":
        return core.compensate(some, theta, [kept] * times, block, 0.1)
    if name == "n_of_m_joint":
        return core.n_of_m_joint(some, theta, shapes, block, 2, 4, 0.1)
    raise ValueError(name)

def report():
    # The interpreter is free for this thread while the other one is in the call.
    entered.wait()
    print("in the call", flush=True)

entered = threading.Event()
name = sys.argv[1]
expected = call(name, 1)
thread = threading.Thread(target=report)
thread.start()
try:
    entered.set()
    call(name, times)
except KeyboardInterrupt:
    pass
else:
    raise SystemExit("not interrupted")
thread.join()
for a, b in zip(expected[0], call(name, 1)[0]):
    assert np.array_equal(a, b)
print("as before")
"""


@pytest.mark.parametrize("stack", [None, 2**50])
@pytest.mark.parametrize("name", ["eliminate", "inverse_diagonal", "compensate", "n_of_m_joint"])
def test_an_interrupt_ends_a_call(python_env, name, stack):
    # Such a stack cannot be allocated: the calling thread works alone.
    more = {} if stack is None else {"RUST_MIN_STACK": str(stack)}
    command = [sys.executable, "-c", CALLS, name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=python_env | more, **pipes) as child:
        try:
            assert child.stdout.readline() == "in the call\n"
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=90)
        finally:
            child.kill()
    assert (out, child.returncode) == ("as before\n", 0), err


# Statistics that are updated until an interrupt comes are those of a whole number of updates.
UPDATES = """
import sys
import torch
import fastsal

torch.manual_seed(0)
torch.set_num_threads(1)
shapes = {"a": (300, 70), "b": (900,), "c": (40, 30, 3)}
grads = {name: torch.randn(40, *shape) for name, shape in shapes.items()}

def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in shapes)

def equals(fisher, reference):
    return (
        fisher.samples == reference.samples
        and same(fisher.diagonal(), reference.diagonal())
        and same(fisher.mean_gradient(), reference.mean_gradient())
    )

for block_size in (64, 256):
    for _ in range(3):
        fisher = fastsal.BlockFisher(shapes, block_size=block_size)
        try:
            print("updating", flush=True)
            while True:
                fisher.update(grads)
        except KeyboardInterrupt:
            pass
        # The interrupt may have come before the first one, or in the middle of it.
        fisher.update(grads)
        reference = fastsal.BlockFisher(shapes, block_size=block_size)
        for _ in range(fisher.samples // 40):
            reference.update(grads)
        assert equals(fisher, reference), (fisher, reference)
print("whole updates", flush=True)
"""


def test_an_interrupt_leaves_whole_updates(python_env):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", UPDATES], env=python_env, **pipes) as child:
        try:
            while (line := child.stdout.readline()) == "updating\n":
                child.send_signal(signal.SIGINT)
            err = child.communicate(timeout=90)[1]
        finally:
            child.kill()
    assert (line, child.returncode) == ("whole updates\n", 0), err
