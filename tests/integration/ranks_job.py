"""One rank of a job: run under `torchrun` by `test_distributed.py`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastsal.distributed
from fastsal.distributed.collecting import collected
from fastsal.distributed.thresholds import masks_of_shards
from fastsal.errors import FactorizationError
from fastsal.fisher.parts import slices


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
    # Several processes do not reconstruct.
    "auto features": {"damping": "auto", "curvature": "features", "reconstruct": False},
    "layer": {"damping": 1e-3, "criterion": "block-fisher", "scope": "layer"},
    "erk": {"damping": 1e-3, "criterion": "magnitude", "scope": "erk", "floor": 0.1},
    "floor": {"damping": 1e-3, "floor": 0.25},
    "sampled": {"damping": 1e-3, "curvature": "sampled"},
    "features": {"damping": 1e-3, "curvature": "features"},
    "random": {"criterion": "random", "compensate": False},
    "macs": {"damping": 1e-3, "budget": "macs", "floor": 0.1},
    "2:4": {"damping": 1e-3, "pattern": "2:4", "sparsity": None},
    "2:4 by sums": {
        "damping": 1e-3,
        "criterion": "magnitude",
        "pattern": "2:4",
        "sparsity": None,
    },
    "1x4": {"damping": 1e-3, "pattern": "1x4"},
    "1x4 by sums": {"damping": 1e-3, "criterion": "diag-fisher", "pattern": "1x4", "floor": 0.1},
    "safe": {"damping": 1e-3, "sparsity": None, "max_loss_increase": 1.0, "confidence": 0.6},
}
# Statistics that do not fit: several passes, and a scratch file on every rank or, without a folder
# for it, passes again for each use.
BUDGET = 104 * 2**20
LIMITED = {
    "budget": {"damping": 1e-3},
    "budget auto": {"damping": "auto"},
    "budget features": {"damping": 1e-3, "curvature": "features"},
    "budget 2:4": {"damping": 1e-3, "pattern": "2:4", "sparsity": None},
    "again": {"damping": 1e-3},
    "again auto": {"damping": "auto"},
    "again 2:4": {"damping": 1e-3, "pattern": "2:4", "sparsity": None},
}


def costs_of(shapes):
    """A cost of one weight of each parameter; the second one has none."""
    return {name: (4.0, 0.0, 1.0)[number % 3] for number, name in enumerate(shapes)}


def parts_of_a_model(shapes):
    """A sparsity of the last parameter, one of all but the second, and none of the second."""
    first, _, *others = shapes
    return {others[-1]: 0.3, **dict.fromkeys([first, *others[:-1]], 0.7)}


def prune(call, model, how, **more):
    """Prune in one of the ways."""
    how = {"sparsity": 0.7, **how, **more}
    return call(model, images(), how.pop("sparsity"), micro_batch=2, **how)


@contextlib.contextmanager
def watching(model):
    """What runs through a model: the size of each micro-batch, and a digest of its images."""
    seen = set()

    def look(_, inputs):
        x = inputs[0].detach().contiguous()
        seen.add(f"{len(x)} {hashlib.sha1(x.numpy().tobytes()).hexdigest()}")

    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    handle = inner[0].register_forward_pre_hook(look)
    yield seen
    handle.remove()


def wrapped(name):
    """The model as it is trained: alone, in DDP, or sharded by FSDP2."""
    model = net()
    if name == "fixed":
        return nn.parallel.DistributedDataParallel(model)
    if name == "floor":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return parallelize_module(model, mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})
    if name == "auto":
        fully_shard(model[3])
        fully_shard(model)
    return model


@contextlib.contextmanager
def failing_on_one_rank(damping):
    """Let blocks of the last rank seem singular at one damping, from the second group on."""
    import fastsal.distributed.process as module

    real = module.score_tensors

    def failing(mine, statistics, entry, given, *more):
        if given == damping and dist.get_rank() == dist.get_world_size() - 1:
            for number, _ in enumerate(statistics.groups()):
                if number or statistics.plan is None:
                    raise FactorizationError("singular")
        return real(mine, statistics, entry, given, *more)

    module.score_tensors = failing
    try:
        yield
    finally:
        module.score_tensors = real


def main(folder):
    """Collect and prune in every way; rank 0 writes what came out."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    fisher = fastsal.distributed.collect(net(), images(), micro_batch=2)
    torch.save(
        {name: (fisher.blocks(name), fisher.samples) for name in fisher.names},
        folder / f"blocks{rank}.pt",
    )
    summed = fastsal.distributed.collect(
        net(), images(), micro_batch=2, samples=52, exchange="sums"
    )
    torch.save({name: summed.blocks(name) for name in summed.names}, folder / f"summed{rank}.pt")
    budget = {"memory_budget": BUDGET, "scratch": folder}
    ranks = fastsal.distributed.Ranks()
    how = {"micro_batch": 2, "samples": 52, "exchange": "sums", **budget}
    assert collected(ranks, net(), images(), **how).plan.passes > 1
    summed = fastsal.distributed.collect(net(), images(), **how)
    fastsal.distributed.save(summed, folder / "summed")
    # 26 samples a rank or fewer: rows are less than sums of blocks of 64.
    chosen = fastsal.distributed.collect(
        net(), images(), micro_batch=2, samples=52, exchange="auto"
    )
    assert all(torch.equal(chosen.blocks(name), fisher.blocks(name)) for name in fisher.names)
    fastsal.distributed.save(fisher, folder / "fisher")
    told = {"nbytes": fisher.nbytes, "names": fisher.names}
    for name, how in (HOW | LIMITED).items():
        model = wrapped(name)
        budget = {"memory_budget": BUDGET} if name in LIMITED else {}
        if name.startswith("budget"):
            budget["scratch"] = folder
        with watching(model) as seen:
            result = prune(fastsal.distributed.prune, model, how, **budget)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if name == "budget auto":
            result_of_auto = result.history[0]
        if rank == 0 or name not in ("auto", "floor"):
            torch.save((dict(result.masks), state), folder / f"{name}{rank}.pt")
        told[name] = asdict(result.history[-1].ranks) | {
            "plan": result.history[-1].memory_plan,
            "safe": None if result.safety is None else result.safety.as_dict(),
            "evidence": result.history[0].damping_evidence,
            "seen": sorted(seen),
        }
    smallest = result_of_auto.damping_evidence[0][0]
    for name, more in {"memory": {}, "again": {"memory_budget": BUDGET}}.items():
        with failing_on_one_rank(smallest):
            result = prune(fastsal.distributed.prune, net(), {"damping": "auto"}, **more)
        evidence = result.history[0].damping_evidence
        told[f"failing {name}"] = {"evidence": evidence}
        torch.save(dict(result.masks), folder / f"failing {name}{rank}.pt")
    # Scores with many ties, over parts: the order of positions decides.
    shares = collected(ranks, net(), images(), micro_batch=2).shares
    shapes = {name: tuple(p.shape) for name, p in net().named_parameters() if p.dim() > 1}
    torch.manual_seed(3)
    full = {name: torch.randint(0, 5, shape).float() for name, shape in shapes.items()}
    parts = {part.key: part for part in shares[rank]}
    for floor in (0.0, 0.35):
        masks = masks_of_shards(slices(full, parts), shares, shapes, ranks, 0.6, floor=floor)
        torch.save(dict(masks), folder / f"ties{floor}{rank}.pt")
        how = {"floor": floor, "costs": costs_of(shapes)}
        masks = masks_of_shards(slices(full, parts), shares, shapes, ranks, 0.6, **how)
        torch.save(dict(masks), folder / f"costs{floor}{rank}.pt")
    for scope in ("global", "layer"):
        goals = parts_of_a_model(shapes)
        masks = masks_of_shards(slices(full, parts), shares, shapes, ranks, goals, scope=scope)
        torch.save(dict(masks), folder / f"parts{scope}{rank}.pt")
    (folder / f"told{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
    # All is written. Without this PyTorch now and then aborts while the interpreter is torn down
    # ("terminate called without an active exception"), where models of FSDP2 were used.
    os._exit(0)
