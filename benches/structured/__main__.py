"""Units removed from real models: `python -m benches.structured [--subjects NAME ...]`.

A quarter and a half of the MLP units, heads or channels of the subjects of
`benches.structured.subjects` is removed by each method of `benches.structured.methods`, for several
random draws of calibration images. Cells that the file of results has are not run again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benches.cells import Cells, fill, matching, table_parser
from benches.quality.table import tables
from benches.structured.methods import METHODS
from benches.structured.subjects import SUBJECTS, Goal
from fastsal.deploy.sizes import model_size

RESULTS = Path(__file__).resolve().parents[1] / "results" / "structured.json"


def main() -> None:
    """Run the cells that are missing, and print the tables."""
    parser = table_parser("python -m benches.structured", __doc__, SUBJECTS, RESULTS)
    parser.add_argument("--samples", type=int, help="number of images of a draw")
    parser.add_argument("--goals", nargs="+", metavar="GOAL", help="such as '0.5 of mlp'")
    print(tables(fill(parser.parse_args(), _run)))


def _run(name: str, given: argparse.Namespace, cells: Cells) -> None:
    options = {} if given.samples is None else {"samples": given.samples}
    subject = SUBJECTS[name](given.data, given.device, **options)

    def measure(model: torch.nn.Module) -> dict[str, float]:
        size = model_size(model, subject.images[:1], has_values=False)
        counts = {"million MACs": size.macs / 1e6, "million parameters": size.parameters / 1e6}
        return {**subject.measure(model), **counts}

    def cell(method: str, seed: int, goal: Goal) -> None:
        def work() -> Callable[[], dict[str, float]]:
            model = copy.deepcopy(subject.model)
            METHODS[method](model, subject.draw(seed), goal, subject)
            return partial(measure, model)

        cells.add((name, method, subject.samples, seed, str(goal)), work)

    cells.add_dense((name, "dense", 0, 0, "none"), lambda: measure(subject.model))
    wanted = matching(METHODS, given.methods)
    for method in wanted:
        for seed in given.seeds:
            for goal in subject.goals:
                if given.goals and str(goal) not in given.goals:
                    continue
                if goal.structure == "heads" and "Torch-Pruning" in method:
                    continue  # its importance of heads fails on timm's attention
                cell(method, seed, goal)


if __name__ == "__main__":
    main()
