"""Accuracy after pruning with labels: `python -m benches.quality.labeled [--data FOLDER]`.

The ResNet-20 of `examples/` is pruned without fine-tuning, for three random draws of calibration
images (the first draw is the first N training images). The table shows mean and standard deviation
of the accuracy on `cifar10_test`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import fastsal
from benches.quality.peers import independent_update
from benches.quality.subjects import DATA, DATA_HELP, accuracy, drawn, load_resnet20

SPARSITIES = (0.6, 0.7, 0.8, 0.9)


def one_shot(model, images, test, damping):
    """Yield the rows of the table that share one set of statistics."""
    fisher = fastsal.collect(model, [images])
    for criterion, update in (
        ("magnitude", "none"),
        ("block-fisher", "none"),
        ("block-fisher", "independent"),
        ("block-fisher", "joint"),
        ("magnitude", "joint"),
        ("obs-greedy", "joint"),
    ):
        scores = fastsal.score(model, fisher, criterion, damping)
        for sparsity in SPARSITIES:
            masks = fastsal.rank(scores, sparsity)
            pruned = copy.deepcopy(model)
            if update == "joint":
                fastsal.compensate(pruned, fisher, masks, damping)
            elif update == "independent":
                independent_update(pruned, fisher, masks, damping)
            masks.apply(pruned)
            yield f"{criterion} + {update}", sparsity, accuracy(pruned, test)


def rounds(model, images, test, count, sparsities, curvature):
    """Yield the rows of `prune` with its defaults: greedy, joint compensation, damping "auto"."""
    kind = "" if curvature == "empirical" else f", curvature={curvature}"
    for sparsity in sparsities:
        pruned = copy.deepcopy(model)
        result = fastsal.prune(pruned, [images], sparsity, rounds=count, curvature=curvature)
        result.masks.verify(pruned)
        yield f"prune, {count} round(s), auto{kind}", sparsity, accuracy(pruned, test)


def main() -> None:
    """Run the benchmark, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help=DATA_HELP)
    parser.add_argument("--samples", type=int, nargs="+", default=[1024], help="numbers of images")
    parser.add_argument("--rounds", type=int, nargs="*", default=[1, 8], help="numbers of rounds")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the draws"
    )
    parser.add_argument(
        "--sparsities",
        type=float,
        nargs="+",
        default=list(SPARSITIES),
        help="sparsities of `prune`",
    )
    parser.add_argument("--no-peers", action="store_true", help="run only the rows of `prune`")
    parser.add_argument(
        "--curvature", nargs="+", default=["empirical", "features"], help="kinds of gradients"
    )
    parser.add_argument(
        "--damping", type=float, default=1e-5, help="λ of the rows other than `prune`"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    model, train, test = load_resnet20(given.data)
    table: dict[tuple[str, float], list[float]] = {}
    start = time.perf_counter()
    for n in given.samples:
        for seed in given.seeds:
            images = drawn(*train, seed, n)
            jobs = [] if given.no_peers else [one_shot(model, images, test, given.damping)]
            for count in given.rounds:
                wanted = [s for s in given.sparsities if count == 1 or s > SPARSITIES[0]]
                jobs += [
                    rounds(model, images, test, count, wanted, curvature)
                    for curvature in given.curvature
                ]
            for job in jobs:
                for name, sparsity, value in job:
                    table.setdefault((f"{name}, N={n}", sparsity), []).append(value)
                    spent = time.perf_counter() - start
                    print(
                        f"{spent:6.0f} s  {name}, N={n}, seed {seed}, {sparsity}: {value:.4f}",
                        flush=True,
                    )
    names = list(dict.fromkeys(name for name, _ in table))
    print(
        f"\n| accuracy, dense {accuracy(model, test):.3f} | "
        + " | ".join(map(str, SPARSITIES))
        + " |\n|---" * 1
        + "|---" * len(SPARSITIES)
        + "|"
    )
    for name in names:
        cells = []
        for sparsity in SPARSITIES:
            values = table.get((name, sparsity))
            spread = f" ± {statistics.stdev(values):.3f}" if values and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if given.out:
        rows = [{"row": n, "sparsity": s, "accuracy": v} for (n, s), v in table.items()]
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
