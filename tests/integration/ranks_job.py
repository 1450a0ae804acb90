"""One rank of a job: run under `torchrun` by `test_distributed.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fastsal.distributed
from fastsal.distributed.thresholds import rank_shards
from fastsal.parts import slices


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ).eval()


def images(count=52):
    torch.manual_seed(1)
    x, y = torch.randn(count, 3, 8, 8), torch.randint(0, 10, (count,))
    return [(x[i : i + 20], y[i : i + 20]) for i in range(0, count, 20)]


HOW = {
    "fixed": {"damping": 1e-4},
    "auto": {"damping": "auto", "rounds": 2},
    "layer": {"damping": 1e-3, "criterion": "block-fisher", "scope": "layer"},
    "erk": {"damping": 1e-3, "criterion": "magnitude", "scope": "erk", "floor": 0.1},
    "floor": {"damping": 1e-3, "floor": 0.25},
    "sampled": {"damping": 1e-3, "labels": "sampled"},
    "features": {"damping": 1e-3, "labels": "features"},
    "random": {"criterion": "random", "compensate": False},
}


def main(folder):
    """Collect and prune in every way; rank 0 writes what came out."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    fisher = fastsal.distributed.collect(net(), images(), micro_batch=2)
    torch.save(
        {name: (fisher.blocks(name), fisher.samples) for name in fisher.names},
        folder / f"blocks{rank}.pt",
    )
    told = {"nbytes": fisher.nbytes, "names": fisher.names}
    for name, how in HOW.items():
        model = nn.parallel.DistributedDataParallel(net()) if name == "fixed" else net()
        result = fastsal.distributed.prune(model, images(), 0.7, micro_batch=2, **how)
        plain = model.module if name == "fixed" else model
        result.masks.verify(plain)
        torch.save((dict(result.masks), plain.state_dict()), folder / f"{name}{rank}.pt")
        told[name] = result.history[-1]["ranks"]
    # Scores with many ties, over parts: the order of positions decides.
    ranks = fastsal.distributed.Ranks()
    shapes = {name: tuple(p.shape) for name, p in net().named_parameters() if p.dim() > 1}
    torch.manual_seed(3)
    full = {name: torch.randint(0, 5, shape).float() for name, shape in shapes.items()}
    parts = {part.key: part for part in fisher._shares[rank]}
    for floor in (0.0, 0.35):
        masks = rank_shards(slices(full, parts), fisher._shares, shapes, ranks, 0.6, floor=floor)
        torch.save(dict(masks), folder / f"ties{floor}{rank}.pt")
    (folder / f"told{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
