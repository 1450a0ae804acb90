"""Accuracy after pruning: `python -m benches.quality [--subjects NAME ...] [--methods TEXT ...]`.

Each subject of `benches.quality.subjects` is pruned by each method of `benches.quality.methods`
without labels and without fine-tuning, for several random draws of calibration images. A cell that
is in the file of results already is not run again, so that a long table can be made in several
sittings; rows that were measured with other code are removed by hand.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benches.cells import Cells, fill, matching, table_parser
from benches.quality.methods import METHODS
from benches.quality.subjects import SUBJECTS
from benches.quality.table import tables

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality.json"


def main() -> None:
    """Run the cells that are missing, and print the tables."""
    parser = table_parser("python -m benches.quality", __doc__, SUBJECTS, RESULTS)
    parser.add_argument("--samples", type=int, nargs="+", help="numbers of calibration images")
    parser.add_argument("--sparsities", type=_goal, nargs="+", help="sparsities, or patterns: 2:4")
    print(tables(fill(parser.parse_args(), _run)))


def _goal(text: str) -> float | str:
    return text if ":" in text else float(text)


def _run(name: str, given: argparse.Namespace, cells: Cells) -> None:
    subject = SUBJECTS[name](given.data, given.device)

    def cell(method: str, samples: int, seed: int, sparsity: float | str) -> None:
        def work() -> Callable[[], dict[str, float]]:
            model = copy.deepcopy(subject.model)
            METHODS[method](model, subject.draw(seed, samples), sparsity)
            return partial(subject.measure, model)

        cells.add((name, method, samples, seed, sparsity), work)

    cells.add_dense((name, "dense", 0, 0, 0.0), lambda: subject.measure(subject.model))
    wanted = matching(METHODS, given.methods)
    for seed in given.seeds:
        for samples in given.samples or subject.samples[:1]:
            for method in wanted:
                for sparsity in given.sparsities or subject.sparsities:
                    cell(method, samples, seed, sparsity)


if __name__ == "__main__":
    main()
