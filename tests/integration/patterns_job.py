"""One rank of a job: patterns along input axes that differ by layer; see `test_rank_patterns.py`.

Arguments: the folder for results, the number of this rank, and the number of ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fastsal.distributed

HOW = {
    "2:4": {"pattern": "2:4"},
    "2:4 by sums": {"pattern": "2:4", "criterion": "magnitude"},
    "1x2": {"pattern": "1x2", "sparsity": 0.5},
    "1x2 by sums": {
        "pattern": "1x2",
        "sparsity": 0.5,
        "criterion": "diag-fisher",
        "scope": "layer",
    },
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3, groups=4), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


def arguments(name):
    torch.manual_seed(1)
    batches = [(torch.randn(12, 3, 8, 8), torch.arange(12) % 4)]
    names = ["0.weight", "2.weight", "4.weight", "7.weight"]
    how = {"damping": 1e-3, "parameters": names, "block_size": 16, "micro_batch": 2, **HOW[name]}
    return batches, how


def main():
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size
    )
    recipes = {}
    for number, name in enumerate(HOW):
        batches, how = arguments(name)
        result = fastsal.distributed.prune(net(), batches, **how)
        result.masks.save(folder / f"{rank}-{number}.safetensors")
        recipes[name] = result.masks.recipe["input_axes"]
    (folder / f"{rank}.json").write_text(json.dumps(recipes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
