"""Cases of the gradient engine, alone and in `collect`, beside plain passes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import fastsal
from fastsal.cli.bench.peers import plain_passes, torch_func_gradients
from fastsal.cli.bench.sizes import BenchSize, faster, longer
from fastsal.cli.bench.timing import Case, Comparison, Seconds, keep_freed_memory, seconds_of
from fastsal.gradients import GradientEngine, select_parameters

MICRO_BATCH = 8


def engine_cases(size: BenchSize) -> Iterator[Case]:
    """Yield the cases of gradients and of collection."""
    yield Case(
        "per-sample gradients of resnet18, a micro-batch of 8 at 224 px",
        "times as fast",
        1.0,
        partial(_gradients, "resnet18"),
    )
    for name in size.models:
        yield Case(
            f"collect of {name}, {size.images} images at 224 px, micro-batches of {MICRO_BATCH}",
            "times as long",
            1.2,
            partial(_collect, size.images, name),
            at_least=False,
        )
    for name in size.models:
        yield Case(
            f"first collect of a process, {name}, {size.images // 2} images at 224 px",
            "times as long",
            1.4,
            partial(_first_collect, size.images // 2, name),
            at_least=False,
        )


def _model(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    import timm

    model = timm.create_model(name, pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 224, 224, generator=generator)
    return model, images, torch.randint(0, 1000, (n,), generator=generator)


def _gradients(name: str) -> Comparison:
    model, images, labels = _model(name, 8)
    engine = GradientEngine(model, select_parameters(model, None), micro_batch=8)
    engine.__enter__()  # hooks are active until the case is dropped
    return Comparison(
        lambda: engine.run(images, labels, lambda *_: None),
        lambda: torch_func_gradients(model, images, labels),
        "torch.func.vmap",
        faster,
        3,
    )


def _collect(n: int, name: str) -> Comparison:
    keep_freed_memory()
    model, images, labels = _model(name, n)
    return Comparison(
        lambda: fastsal.collect(model, [(images, labels)], micro_batch=MICRO_BATCH),
        lambda: plain_passes(model, images, labels, MICRO_BATCH),
        "the plain forward and backward passes",
        longer,
        3,
    )


def _first_collect(n: int, name: str) -> Comparison:
    """Compare within new processes, where no memory has been touched."""
    times: list[Seconds] = []

    def ours() -> Seconds:
        command = [sys.executable, "-m", __name__, name, str(n), str(torch.get_num_threads())]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        times[:] = map(Seconds, json.loads(out))
        return times[0]

    return Comparison(
        ours,
        lambda: times[1],
        "the plain passes of the same process, after a first time",
        longer,
        3,
        warm_up=False,
    )


def _report(name: str, n: int, threads: int) -> None:
    """Print the seconds of the first collection of this process, and of plain passes before it."""
    warnings.simplefilter("ignore")  # that the labels are random
    torch.set_num_threads(threads)
    fastsal.set_num_threads(threads)
    model, images, labels = _model(name, n)
    plain = partial(plain_passes, model, images, labels, MICRO_BATCH)
    plain()
    theirs = seconds_of(plain)
    batches = [(images, labels)]
    ours = seconds_of(lambda: fastsal.collect(model, batches, micro_batch=MICRO_BATCH))
    print(json.dumps([ours, theirs]))


if __name__ == "__main__":
    _report(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
