"""What all benches share: a release build, fixed threads, and a ratio against the peer."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from fastsal import _core

THREADS = min(2, os.cpu_count() or 1)


def pytest_configure() -> None:
    """Refuse a debug build: its times say nothing."""
    _, isa, is_release = _core.build_info()
    if not is_release:
        raise pytest.UsageError("benches need a release build: make build")
    torch.set_num_threads(THREADS)
    _core.set_num_threads(THREADS)
    print(f"fastsal core: {isa}, {THREADS} threads; torch {torch.__version__}")


@pytest.fixture
def against(benchmark, capsys) -> Callable[..., float]:
    """Time ours and the peer in turn; record and return the median of peer over ours."""

    def run(
        ours: Callable[[], object], peer: Callable[[], object], *, pairs: int = 5, peer_name: str
    ) -> float:
        mine, theirs = [], []
        ours()
        for _ in range(pairs):
            for job, times in ((ours, mine), (peer, theirs)):
                start = time.perf_counter()
                job()
                times.append(time.perf_counter() - start)
        ratio = statistics.median(t / m for t, m in zip(theirs, mine, strict=True))
        benchmark.extra_info.update(
            peer=peer_name,
            ratio=ratio,
            ours=statistics.median(mine),
            theirs=statistics.median(theirs),
        )
        benchmark.pedantic(ours, rounds=1)
        with capsys.disabled():
            print(
                f"\n{benchmark.name}: ours {statistics.median(mine):.4f} s, {peer_name} "
                f"{statistics.median(theirs):.4f} s, ratio {ratio:.2f}"
            )
        return ratio

    return run
