"""Sizes of the parts, and what every part needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """`Size()` is that of the published figures; `SMOKE` runs in half a minute on a CPU.

    Attributes:
        models: Names in timm.
        pixels: Height and width of the images; None is the model's own.
        images: Images of one collection.
        batch: Images of a plain pass.
        micro_batches: Micro-batches to try; None is the one that fastsal chooses.
        weights: Weights of the sums, those of a ViT-B.
        layer: Weights of one parameter of the sums.
        samples: Rows of the sums.
        rows: Rows that are added at a time.
        streamed: Rows that are streamed to the core.
        peer: Weights and gradients of the comparison with SparseML.
        compared: Images of the comparison with the CPU.
        buffer: Bytes that are read to measure the bandwidth.
        side: Rows of the square matrices that measure products.
        solved: Blocks of one batched factorization.
        patterned: Names in timm of the models with 2:4 zeros.
        patterned_batches: Numbers of images of their passes.
        repeats: Repetitions of a measurement.
    """

    models: tuple[str, ...] = ("resnet50", "vit_small_patch16_224", "vit_base_patch16_224")
    pixels: int | None = None
    images: int = 1024
    batch: int = 64
    micro_batches: tuple[int | None, ...] = (None, 32)
    weights: int = 86_000_000
    layer: int = 768 * 3072
    samples: int = 1024
    rows: tuple[int, ...] = (16, 64, 256)
    streamed: int = 64
    peer: tuple[int, int] = (2**20, 1024)
    compared: int = 32
    buffer: int = 8 * GIB
    side: int = 8192
    solved: int = 2**15
    patterned: tuple[str, ...] = ("vit_small_patch16_224", "vit_large_patch16_224")
    patterned_batches: tuple[int, ...] = (1, 64, 256)
    repeats: int = 3


SMOKE = Size(
    models=("test_resnet",),
    pixels=32,
    images=8,
    batch=4,
    micro_batches=(None, 4),
    weights=3 * 2**12,
    layer=2**12 + 40,
    samples=32,
    rows=(16,),
    streamed=8,
    peer=(2**10, 16),
    compared=8,
    buffer=2**20,
    side=128,
    solved=2**6,
    patterned=("test_vit",),
    repeats=1,
)


def wait(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(job: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return the median time of a job, after a run that is not counted if it is repeated."""
    found = []
    for turn in range(repeats + (repeats > 1)):
        wait(device)
        start = time.perf_counter()
        job()
        wait(device)
        if turn or repeats == 1:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def row(name: str, figure: float, unit: str, **more: Any) -> Row:
    """Return one line of the result; `at_most` or `at_least` is what is aimed at."""
    return {"name": name, "figure": figure, "unit": unit, **more}


def start_peak(device: torch.device) -> None:
    """Begin to measure the peak of the memory of a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(name: str, device: torch.device) -> Iterator[Row]:
    """Yield the peak of the memory of a GPU since `start_peak`."""
    if device.type == "cuda":
        yield row(name, torch.cuda.max_memory_allocated(device) / GIB, "GiB")


def read_rate(size: Size, device: torch.device) -> float:
    """Return the bytes that a device reads in a second, in a sum over a buffer."""
    values = torch.ones(_fitting(size.buffer, device) // 4, device=device)
    return values.nbytes / min(seconds(values.sum, device, 3) for _ in range(2))


def _fitting(nbytes: int, device: torch.device) -> int:
    if device.type != "cuda":
        return nbytes
    return min(nbytes, torch.cuda.mem_get_info(device)[0] // 4)
