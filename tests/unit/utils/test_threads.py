"""Threads of the core: how many, in which processes, and under which limits."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastsal
from fastsal.errors import InvalidArgument

VARIABLES = ("FASTSAL_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS")

# Statistics of many blocks: a call that is not small.
LARGE = """
import os, sys, threading
import numpy as np
import fastsal._core as core

def diagonal(seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((64, 9000), dtype=np.float32)
    packed, sums = np.empty(core.packed_len(9000, 64), np.float32), np.zeros(9000, np.float32)
    core.accumulate(rows, "float32", 64, packed, sums, True)
    return core.inverse_diagonal([(packed, 9000, 64.0, None)], 64, 0.01)[0][0], rows

def check():
    found, rows = diagonal()
    block = rows[:, :64].astype(float)
    exact = np.diagonal(np.linalg.inv(block.T @ block / 64 + 0.01 * np.eye(64)))
    assert np.allclose(found[:64], exact, rtol=1e-4)

def workers():
    names = (open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task"))
    return sum(name.startswith("fastsal-") for name in names)
"""


@pytest.fixture
def run(python_env):
    """Runs a script in a process with some environment variables; returns what it prints."""

    def run(script: str, **variables: object) -> str:
        env = {name: value for name, value in python_env.items() if name not in VARIABLES}
        env |= {name: str(value) for name, value in variables.items()}
        command = [sys.executable, "-c", LARGE + script]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (done.returncode, done.stderr)
        return done.stdout.strip()

    return run


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_NUM_THREADS": 1}, 1),
        ({"OMP_NUM_THREADS": "3,1"}, 3),
        ({"OMP_NUM_THREADS": 1, "RAYON_NUM_THREADS": 3}, 3),
        ({"OMP_NUM_THREADS": 1, "RAYON_NUM_THREADS": 3, "FASTSAL_NUM_THREADS": 4}, 4),
        ({"OMP_NUM_THREADS": 2, "RAYON_NUM_THREADS": 0, "FASTSAL_NUM_THREADS": "none"}, 2),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_environment_sets_the_number_of_threads(run, variables, expected):
    script = "check(); print(core.num_threads(), workers())"
    assert run(script, **variables) == f"{expected} {expected}"


@pytest.mark.skipif(sys.platform != "linux", reason="counts processors by affinity")
def test_the_default_is_what_the_process_may_use(run):
    script = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
check()
print(core.num_threads(), workers())
"""
    assert run(script) == "1 1"


def test_an_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("FASTSAL_NUM_THREADS", "5")
    fastsal.set_num_threads(0)
    assert fastsal.get_num_threads() == 5
    fastsal.set_num_threads(2)
    assert fastsal.get_num_threads() == 2
    fastsal.set_num_threads(0)
    with pytest.raises(InvalidArgument, match="n must be"):
        fastsal.set_num_threads(-1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a stack that cannot be allocated")
def test_without_threads_the_caller_works_alone(run):
    # The standard library of Rust reads the size of a thread's stack from this variable.
    script = "check(); check(); print(workers())"
    assert run(script, RUST_MIN_STACK=2**50, FASTSAL_NUM_THREADS=4) == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_a_fork_while_the_pool_is_built_does_not_hang_the_child(run):
    # Another thread builds pools all the time; the alarm ends a child that waits for ever.
    script = """
import signal, warnings
warnings.simplefilter("ignore")
check()  # what Python imports on first use has a lock of its own
stop = threading.Event()

def build():
    n = 0
    while not stop.is_set():
        n += 1
        core.set_num_threads(2 + n % 2)
        diagonal()

thread = threading.Thread(target=build)
thread.start()
try:
    for _ in range(40):
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            check()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == 0, status
finally:
    stop.set()
    thread.join()
check()
print("done")
"""
    assert run(script) == "done"
