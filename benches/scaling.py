"""Calculated cost of a job of many ranks: `python -m benches.scaling [--ranks 2 4 64]`.

The table shows the bytes that each rank sends and holds, by `fastsal.fisher.collection.traffic`,
whose figures equal the counters of jobs of two and four ranks
(`tests/integration/test_distributed.py`). In addition to statistics a rank holds scores (4 bytes
per weight of its share), masks (one byte per weight), the model, and the memory of a pass.
"""

from __future__ import annotations

import argparse

import timm
import torch

import fastsal
from fastsal.fisher.collection.traffic import costs
from fastsal.fisher.sinks.gathering import step_rows
from fastsal.gradients import choose_micro_batch

GB = 1e9


def main() -> None:
    """Print the table of all numbers of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_large_patch16_224", help="name of a timm model")
    parser.add_argument("--samples", type=int, default=8192, help="number of images of the job")
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[2, 4, 8, 16, 32, 64], help="numbers of ranks"
    )
    args = parser.parse_args()
    with torch.device("meta"):
        model = timm.create_model(args.model)
    chosen = fastsal.select_parameters(model)
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    micro_batch = choose_micro_batch(chosen)
    held = fastsal.BlockFisher(shapes).final_nbytes
    step = step_rows(chosen, held, micro_batch)
    weights = sum(p.numel() for p in chosen.values())
    print(
        f"{args.model}: {weights:,} weights, {args.samples} samples, micro-batches of "
        f"{micro_batch}, added {step} at a time; statistics {held / GB:.1f} GB\n"
    )
    print(
        "| ranks | samples a rank | rows sent | partial sums instead | weights and masks sent | "
        "statistics held | rows waiting | rows arriving |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for ranks in args.ranks:
        c = costs(shapes, args.samples, ranks, micro_batch=micro_batch, step=step)
        print(
            f"| {ranks} | {args.samples / ranks:g} | {max(c.rows) / GB:.1f} GB "
            f"| {c.partial_sums / GB:.1f} GB "
            f"| {(max(c.weights) + max(c.masks)) / GB:.2f} GB | {max(c.statistics) / GB:.2f} GB "
            f"| {max(c.gathered) / GB:.2f} GB | {max(c.in_flight) / GB:.2f} GB |"
        )


if __name__ == "__main__":
    main()
