"""Units removed from real models: `python -m benches.structured [--subjects NAME ...]`.

A quarter and a half of the MLP units, heads or channels of the subjects of
`benches.structured.subjects` is removed by each method of `benches.structured.methods`, for several
random draws of calibration images. Cells that the file of results has are not run again.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benches.cells import Cells
from benches.quality.subjects import DATA, DATA_HELP
from benches.quality.table import tables
from benches.structured.methods import METHODS
from benches.structured.subjects import SUBJECTS, Goal
from fastsal.deploy.sizes import model_size

RESULTS = Path(__file__).resolve().parents[1] / "results" / "structured.json"


def main() -> None:
    """Run the cells that are missing, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benches.structured", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help=DATA_HELP)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of names of rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of all cells")
    parser.add_argument("--show", action="store_true", help="print the tables only")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cells = Cells(given.out)
    if not given.show:
        for name in given.subjects:
            _run(name, given, cells)
    print(tables(cells.rows))


def _run(name: str, given: argparse.Namespace, cells: Cells) -> None:
    subject = SUBJECTS[name](given.data)

    def measure(model: torch.nn.Module) -> dict[str, float]:
        size = model_size(model, subject.images[:1], has_values=False)
        counts = {"million MACs": size.macs / 1e6, "million parameters": size.parameters / 1e6}
        return {**subject.measure(model), **counts}

    def cell(method: str, seed: int, goal: Goal | None) -> None:
        def work() -> Callable[[], dict[str, float]]:
            model = copy.deepcopy(subject.model)
            if goal is not None:
                METHODS[method](model, subject.draw(seed), goal, subject)
            return partial(measure, model)

        samples = 0 if goal is None else subject.samples
        cells.add((name, method, samples, seed, "none" if goal is None else str(goal)), work)

    cell("dense", 0, None)
    wanted = [m for m in METHODS if any(fnmatch.fnmatch(m, p) for p in given.methods)]
    for method in wanted:
        for seed in given.seeds:
            for goal in subject.goals:
                if goal.structure == "heads" and "Torch-Pruning" in method:
                    continue  # its importance of heads fails on timm's attention
                cell(method, seed, goal)


if __name__ == "__main__":
    main()
