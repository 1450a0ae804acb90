"""One rank of a job whose ranks differ: run under `torchrun` by `test_ranks_differ.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fastsal.distributed


class Routed(nn.Module):
    """Layers that micro-batches use or not, once or twice, in one order or another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(24, 10)  # defined first, used last
        self.stem = nn.Linear(48, 24)
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.shared = nn.Linear(24, 24)
        self.aside = nn.Linear(24, 24)
        self.early = nn.Linear(24, 10)

    def forward(self, x):
        flags = (x[0].flatten()[:6] > 0).tolist()
        h = self.stem(x.flatten(1)).relu()
        route = (x[:, 0, 0, 0] > 0).long()
        chosen = torch.zeros_like(h)
        for e in (1, 0) if flags[1] else (0, 1):
            if (route == e).any():
                chosen = chosen + (route == e).float()[:, None] * self.experts[e](h)
        h = (h + chosen).relu()
        h = self.shared(h).relu()
        again = self.shared(h)
        h = h + (again.detach() if flags[2] else again)
        aside = self.aside(h)
        h = h + (aside.detach() if flags[3] else aside)
        early = self.early(h)
        if flags[4]:
            return early
        return self.head(h.relu()) + early


class Sparse(nn.Module):
    """Experts that run on their own images alone, which no rule supports."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(48, 12) for _ in range(2))
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        flat, route = x.flatten(1), (x[:, 0, 0, 0] > 0).long()
        h = flat.new_zeros(len(x), 12)
        for e, expert in enumerate(self.experts):
            at = (route == e).nonzero()[:, 0]
            if len(at):
                h = h.index_copy(0, at, expert(flat[at]))
        return self.head(h.relu())


class Plain(nn.Module):
    """Layers that all images use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.aside, self.head = nn.Linear(48, 24), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.aside(x.flatten(1)).relu())


MODELS = {"routed": Routed, "sparse": Sparse}


def images(count=53, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 4, 4, generator=generator)
    y = torch.randint(0, 10, (count,), generator=generator)
    x[:8].flatten(1)[:, :6] = -1  # the first ones use all layers ...
    # ... and both experts: the first two, and the first two of each rank.
    x[[1, 2, 4, 7], 0, 0, 0] = 1
    return [(x[i : i + 7], y[i : i + 7]) for i in range(0, count, 7)]


class Broken(Exception):
    """An error that fastsal does not know."""


def failing_at(number, error):
    """Batches whose iteration fails."""
    for n, pair in enumerate(images()):
        if n == number:
            raise error
        yield pair


def spoiled(number, value):
    """Batches with an image that is not a number."""
    batches = images()
    batches[number // 7][0][number % 7] = value
    return batches


AGAIN = Broken("again")  # one object, raised twice


def failing_model(error, kind=Routed):
    """A model whose fifth forward pass fails, in the middle of a round."""
    model, calls = kind(), []

    def count(*_):
        calls.append(1)
        if len(calls) == 5:
            raise error

    model.aside.register_forward_hook(count)
    return model


def failing_backward(error):
    """A model whose fourth backward pass fails, when rows of some layers have been sent."""
    model, calls = Routed(), []

    def count(gradient):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return gradient

    def hook(_, __, output):
        if output.requires_grad:
            output.register_hook(count)

    model.stem.register_forward_hook(hook)
    return model


def failing_loss(rank, error):
    """A loss that fails where the held-out images of a rank are measured, without gradients."""

    def loss(outputs, labels):
        if not outputs.requires_grad and dist.get_rank() == rank:
            raise error
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    return loss


def collect(model=None, batches=None, **more):
    return fastsal.distributed.collect(
        Routed() if model is None else model,
        images() if batches is None else batches,
        **{"micro_batch": 2, "block_size": 16, **more},
    )


def prune(**more):
    model = more.pop("model", None) or Plain()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    try:
        fastsal.distributed.prune(model, images(), 0.5, micro_batch=2, block_size=16, **more)
    finally:
        assert all(torch.equal(p, start[name]) for name, p in model.state_dict().items())


def ways(rank, folder):
    """What goes wrong, by name: a call that fails on one rank or on all."""
    last = dist.get_world_size() - 1
    is_last = rank == last
    place = Path("/dev/null") if is_last else folder
    return {
        "iterator": lambda: collect(batches=failing_at(2, Broken("disk")) if is_last else None),
        "interrupt": lambda: collect(
            batches=failing_at(2, KeyboardInterrupt()) if is_last else None
        ),
        "first batch": lambda: collect(batches=failing_at(0, OSError("gone")) if is_last else None),
        "image": lambda: collect(batches=spoiled(30, float("nan"))),
        "forward": lambda: collect(failing_model(MemoryError("no room")) if is_last else None),
        "again": lambda: collect(batches=failing_at(2, AGAIN) if is_last else None),
        "and again": lambda: collect(batches=failing_at(3, AGAIN) if is_last else None),
        "backward": lambda: collect(failing_backward(Broken("hook")) if is_last else None),
        "sums": lambda: collect(
            failing_model(Broken("hook")) if is_last else None, exchange="sums"
        ),
        "samples": lambda: collect(batches=images()[: 6 if is_last else 8]),
        "labels": lambda: collect(batches=images(seed=1 + is_last)),
        "arguments": lambda: collect(block_size=16 + 16 * is_last),
        "calls": lambda: prune() if is_last else collect(),
        "held out": lambda: prune(loss=failing_loss(0, Broken("loss"))),
        "model": lambda: prune(model=failing_model(Broken("hook"), Plain) if is_last else None),
        "file": lambda: fastsal.distributed.save(collect(), place / "fisher"),
    }


def main(folder):
    """Collect from models that differ, and fail in every way."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    for name, kind in MODELS.items():
        for budget in ({}, {"memory_budget": 100 * 2**20, "scratch": folder}):
            fisher = collect(kind(), **budget)
            blocks = {key: (fisher.blocks(key), fisher.samples) for key in fisher.names}
            torch.save(blocks, folder / f"{name}{len(budget)}{rank}.pt")
    told = {}
    for name, call in ways(rank, folder).items():
        start = time.monotonic()
        try:
            call()
            told[name] = ["none", ""]
        except BaseException as error:
            told[name] = [type(error).__name__, str(error), *getattr(error, "__notes__", [])]
        told[f"seconds of {name}"] = time.monotonic() - start
        assert collect().samples == 53  # the processes are still in step
        (folder / f"told{rank}.json").write_text(json.dumps(told))
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
    os._exit(0)
