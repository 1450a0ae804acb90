"""The same multiply-accumulates, pruned by two budgets: `python -m benches.budget`.

Each subject is pruned by `fastsal.prune`, in one round without labels, to a sparsity of its weights
and, from the start again, to the fraction of multiply-accumulates that this removed. Cells that the
file of results has are not run again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import fastsal
from benches.cells import Cells, fill, table_parser
from benches.quality.subjects import SUBJECTS
from benches.quality.table import tables
from fastsal.pruning.masks.costs import cost_of
from fastsal.utils.choices import WeightBudget

RESULTS = Path(__file__).resolve().parent / "results" / "budget.json"
_SPARSITIES = {"resnet20": (0.7, 0.8, 0.9), "lite0": (0.4, 0.5, 0.6)}
_REMOVED = "fraction of the multiply-accumulates removed"


def main() -> None:
    """Run the cells that are missing, and print the tables."""
    parser = table_parser("python -m benches.budget", __doc__, _SPARSITIES, RESULTS)
    print(tables(fill(parser.parse_args(), _run)))


def _run(name: str, given: argparse.Namespace, cells: Cells) -> None:
    subject = SUBJECTS[name](given.data, given.device)
    samples = subject.samples[0]
    costs = fastsal.weight_macs(subject.model, subject.draw(0, samples)[0][0])

    def cell(seed: int, sparsity: float, goal: float, budget: WeightBudget) -> float:
        """Prune to a goal, and return the fraction of multiply-accumulates that are removed."""

        def work() -> Callable[[], dict[str, float]]:
            model = copy.deepcopy(subject.model)
            batches = subject.draw(seed, samples)
            done = fastsal.prune(model, batches, goal, curvature="features", budget=budget)
            total = cost_of({name: mask.numel() for name, mask in done.masks.items()}, costs)
            left = cost_of(done.masks.kept, costs)
            facts = {"sparsity": done.masks.sparsity, _REMOVED: 1 - left / total}
            return lambda: {**subject.measure(model), **facts}

        key = (name, f"a fraction of the {budget}", samples, seed, sparsity)
        cells.add(key, work)
        return float(cells.measures(key)[_REMOVED])

    for seed in given.seeds:
        for sparsity in _SPARSITIES[name]:
            removed = cell(seed, sparsity, sparsity, "weights")
            cell(seed, sparsity, removed, "macs")


if __name__ == "__main__":
    main()
