"""The core and the gradient engine against their peers, in one run: ratios, not absolute times."""

from fastsal.cli.bench.cases import Size, cases
from fastsal.cli.bench.machine import describe, refuse_debug_build
from fastsal.cli.bench.timing import Result, run

__all__ = ["Result", "Size", "cases", "describe", "refuse_debug_build", "run"]
