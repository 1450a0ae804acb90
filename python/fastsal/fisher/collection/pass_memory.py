"""Memory of one forward and backward pass, measured on one and two samples."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastsal.fisher.collection.passes import PassSettings
from fastsal.fisher.memory_plan import PassMemory
from fastsal.gradients.precision import row_dtype
from fastsal.models.outputs import output_tensor
from fastsal.utils.live_memory import LiveMemory, trim_heap


def measure(
    how: PassSettings, names: set[str], images: Tensor, labels: Tensor | None
) -> PassMemory:
    """Measure the memory of passes that form the gradients of some parameters.

    Args:
        how: Settings of the passes.
        names: The parameters.
        images: At least one sample.
        labels: Their labels, or None.
    """
    if how.chosen and next(iter(how.chosen.values())).device.type == "meta":
        return _on_meta(how, names, images)
    peaks = []
    with replace(how, micro_batch=2).engine(names, pads=False) as engine, LiveMemory() as live:
        engine.prepare(*first_samples(images, labels, 2))
        for n in (1, 2):  # buffers between layers grow with the samples
            live.reset()
            engine.run(*first_samples(images, labels, n), drop)
            peaks.append(live.peak + engine.scratch_nbytes)
    trim_heap()
    return _line(*peaks)


def drop(name: str, rows: Tensor) -> None:
    """Discard rows."""
    del name, rows


def _on_meta(how: PassSettings, names: set[str], images: Tensor) -> PassMemory:
    """Measure without computing: count the tensors that autograd keeps on the meta device."""
    peaks = []
    for n in (1, 2):
        x, _ = first_samples(images, None, n)
        tracked = {name: p for name, p in how.chosen.items() if name in names}
        flags = {name: p.requires_grad for name, p in how.model.named_parameters()}
        for p in how.model.parameters():
            p.requires_grad_(False)
        try:
            for p in tracked.values():
                p.requires_grad_(True)
            with LiveMemory() as live:
                outputs = output_tensor(how.model(x.to("meta")))
                torch.autograd.grad(outputs.float().sum(), list(tracked.values()))
                peaks.append(live.peak)
        finally:
            for name, p in how.model.named_parameters():
                p.requires_grad_(flags[name])
    largest = max(p.numel() * row_dtype(p).itemsize for p in how.chosen.values())
    line = _line(*peaks)
    return replace(line, sample=line.sample + largest)


def _line(one: float, two: float) -> PassMemory:
    each = max(0.0, two - one)
    return PassMemory(max(0.0, one - each), each)


def first_samples(images: Tensor, labels: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
    """Return the first `n` samples, repeated if there are fewer."""
    at = torch.arange(n, device=images.device) % len(images)
    return images[at], None if labels is None else labels[at.to(labels.device)]
