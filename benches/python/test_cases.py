"""The cases of `fastsal bench` under pytest-benchmark: `pytest benches/python`.

With FASTSAL_BENCH=full they have the sizes of the published figures.
"""

from __future__ import annotations

import os

import pytest

from fastsal.cli.bench.cases import cases_of
from fastsal.cli.bench.sizes import BenchSize
from fastsal.cli.bench.timing import run

SIZE = BenchSize.full() if os.environ.get("FASTSAL_BENCH") == "full" else BenchSize()


@pytest.mark.parametrize("case", list(cases_of(SIZE)), ids=lambda case: case.name)
def test_case(case, benchmark, capsys):
    results = []
    benchmark.pedantic(lambda: results.extend(run(iter([case]))), rounds=1)
    (result,) = results
    if result.ratio is None:
        pytest.skip(result.note)
    benchmark.extra_info.update(vars(result))
    with capsys.disabled():
        print(f"\n{result.ratio:.2f} {result.figure} as {result.peer}. {result.note}")
