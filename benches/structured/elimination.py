"""Time of a greedy elimination of units: `python -m benches.structured.elimination [UNITS]`.

One matrix of UNITS, 3,072 by default, is inverted, and all units are eliminated one at a time. A
sixth of them is first compared with a plain loop in float64.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from fastsal.pruning.structured.elimination import eliminate
from fastsal.utils.machine import machine


def elimination(units: int) -> dict[str, Any]:
    """Return the seconds of a greedy elimination, and whether a smaller one equals a plain loop."""

    def problem(size: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(size)
        mixed = torch.randn(size, size, generator=draw, dtype=torch.float64)
        a = mixed @ mixed.T / size + 1e-3 * torch.eye(size, dtype=torch.float64)
        return a, torch.randn(size // 4, size, generator=draw, dtype=torch.float64)

    a, w = problem(units // 6)
    inverse, quadratic, left = torch.linalg.inv(a), w.T @ w, torch.ones(len(a), dtype=torch.bool)
    order, costs = eliminate(inverse.clone(), quadratic.clone(), len(a))
    for unit, cost in zip(order.tolist(), costs.tolist(), strict=True):
        found = (quadratic.diagonal() / inverse.diagonal()).masked_fill(~left, torch.inf)
        assert int(found.argmin()) == unit
        assert abs(float(found.min()) - cost) <= 1e-8 * cost
        step = inverse[unit] / inverse[unit, unit]
        row, own = quadratic[unit].clone(), float(quadratic[unit, unit])
        inverse = inverse - torch.outer(inverse[:, unit], step)
        quadratic = quadratic - torch.outer(row, step) - torch.outer(step, row)
        quadratic += own * torch.outer(step, step)
        left[unit] = False
    a, w = problem(units)
    quadratic = w.T @ w
    start = time.perf_counter()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(a))
    middle, own = time.perf_counter(), time.process_time()
    eliminate(inverse, quadratic, units)
    return {
        "units": units,
        "inverse, seconds": round(middle - start, 2),
        "elimination, seconds": round(time.perf_counter() - middle, 2),
        "elimination, seconds of processors": round(time.process_time() - own, 2),
    }


def main() -> None:
    """Print the seconds and the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("units", type=int, nargs="?", default=3072)
    given = parser.parse_args()
    facts = machine()
    print(
        {**elimination(given.units), "processor": facts["processor"], "threads": facts["threads"]}
    )


if __name__ == "__main__":
    main()
