"""Statistics of whole models against plain passes, and masks of the device against the CPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import fastsal
from benches.gpu.size import Row, Size, peak, row, seconds, start_peak
from fastsal.models.placing import autocasting
from fastsal.pruning.recalibration import recalibrate

Batches = list[tuple[Tensor, Tensor]]
_LONG = 6  # seconds of a collection that is not repeated


def model_of(name: str, size: Size, device: torch.device) -> tuple[nn.Module, int]:
    """Return a model with random weights, and the height and width of its images."""
    model = fastsal.load_model(name)
    pixels = size.pixels or model.pretrained_cfg["input_size"][-1]
    # Residual branches begin at zero in timm, and normalization with other moments.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    recalibrate(model, images_of(8, pixels, 8, torch.device("cpu")))
    return model.to(device), pixels


def images_of(n: int, pixels: int, batch: int, device: torch.device) -> Batches:
    """Return batches of random images and labels on the CPU; pinned for a GPU."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for start in range(0, n, batch):
        count = min(batch, n - start)
        images = torch.randn(count, 3, pixels, pixels, generator=generator)
        labels = torch.randint(0, 1000, (count,), generator=generator)
        found.append((images.pin_memory() if device.type == "cuda" else images, labels))
    return found


def plain(
    model: nn.Module, batches: Batches, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Run a forward and a backward pass over each batch."""
    for images, labels in batches:
        model.zero_grad(set_to_none=True)
        with autocasting(device, dtype):
            outputs = model(images.to(device, non_blocking=True))
            loss = nn.functional.cross_entropy(outputs, labels.to(device))
        loss.backward()
    model.zero_grad(set_to_none=True)


def passes(size: Size, device: torch.device) -> Iterator[Row]:
    """Time `collect` against plain forward and backward passes over the same images."""
    for name in size.models:
        model, pixels = model_of(name, size, device)
        batches = images_of(size.images, pixels, size.batch, device)
        for dtype in (None, torch.bfloat16):
            what = f"{name}, {'float32' if dtype is None else 'bfloat16 autocast'}"
            job = partial(plain, model, batches, device, dtype)
            start_peak(device)
            job()  # chooses kernels
            base = seconds(job, device)
            yield row(f"{what}: plain passes", base, "s")
            yield from peak(f"{what}: memory of plain passes", device)
            for micro_batch in size.micro_batches:
                how = {"autocast": dtype, "micro_batch": micro_batch, "block_size": 64}
                job = partial(fastsal.collect, model, batches, **how)
                start_peak(device)
                first = seconds(job, device)
                spent = seconds(job, device) if first < _LONG else first
                each = "" if micro_batch is None else f", micro-batches of {micro_batch}"
                more = {"times": spent / base, "at_most": 1.25, "first": first}
                yield row(f"{what}: collect{each}", spent, "s", **more)
                yield from peak(f"{what}: memory of collect{each}", device)


def masks(size: Size, device: torch.device) -> Iterator[Row]:
    """Compare the masks of `prune` on the device with those on the CPU, and its time there."""
    cpu = torch.device("cpu")
    name = size.models[0]
    found: dict[str, fastsal.Masks] = {}

    def prune(key: str, place: torch.device, dtype: torch.dtype | None = None) -> None:
        model, pixels = model_of(name, size, place)
        batches = images_of(size.compared, pixels, size.batch, device)
        result = fastsal.prune(model, batches, 0.7, damping="0.1x", autocast=dtype)
        result.masks.verify(model)
        found[key] = result.masks

    yield row(f"prune of {name} on the CPU", seconds(partial(prune, "CPU", cpu), cpu), "s")
    for key, tf32, dtype in (
        ("float32", False, None),
        ("TF32 in convolutions", True, None),
        ("bfloat16 autocast", True, torch.bfloat16),
    ):
        with cudnn_tf32(tf32):
            spent = seconds(partial(prune, key, device, dtype), device)
        wanted = found["CPU"]
        same = sum(int((found[key][n] == wanted[n]).sum()) for n in wanted) / wanted.total
        least = {"at_least": 0.99} if key == "float32" else {}
        yield row(f"masks of {name} equal to the CPU's, {key}", same, "of the weights", **least)
        yield row(f"prune of {name} on the device, {key}", spent, "s")


@contextlib.contextmanager
def cudnn_tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
