"""Models with 2:4 zeros beside their dense ones, in float16, as PyTorch runs them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

import fastsal
from benches.gpu.passes import images_of, model_of
from benches.gpu.size import Row, Size, row, seconds
from fastsal.deploy.semi_structured import semi_structured, two_of_four_layers
from fastsal.deploy.timing import time_models

_TIME = 2.0  # seconds of each pair


def two_of_four(size: Size, device: torch.device) -> Iterator[Row]:
    """Prune the layers of vision transformers to 2:4, compress them on the GPU, and time them.

    A CPU counts the layers alone.
    """
    for name in size.patterned:
        dense, pixels = model_of(name, size, device)
        pruned = copy.deepcopy(dense)
        masks = fastsal.rank(fastsal.score(pruned, None, "magnitude"), pattern="2:4", model=pruned)
        masks.apply(pruned)
        layers = two_of_four_layers(pruned)
        yield row(f"{name}: layers with 2:4 zeros", len(layers), "layers")
        if device.type != "cuda":
            continue
        stored, names = semi_structured(pruned, torch.float16)
        yield row(f"{name}: layers that PyTorch compresses", len(names), "layers")
        half, zeros = (m.to(torch.float16).eval() for m in (dense, pruned))
        for batch in size.patterned_batches:
            images = images_of(batch, pixels, batch, device)[0][0]
            with torch.no_grad():
                x = images.to(device, torch.float16)
                wanted, found = zeros(x).float(), stored(x).float()
            off = float((found - wanted).abs().max() / wanted.abs().max())
            timing = time_models(half, stored, images, seconds=_TIME)
            yield row(
                f"{name}, {batch} images: dense {1e3 * timing.dense[0]:.2f} ms, 2:4",
                1e3 * timing.pruned[0], "ms", times=timing.speedup[0], error=off,
            )  # fmt: skip
        yield from _layer(name, next(iter(layers.values())), device)


def _layer(name: str, layer: nn.Linear, device: torch.device) -> Iterator[Row]:
    """Time the product of one layer, dense and compressed."""
    layer = copy.deepcopy(layer).to(torch.float16)
    x = torch.randn(2**15, layer.in_features, dtype=torch.float16, device=device)
    stored = semi_structured(nn.Sequential(layer), torch.float16)[0]
    with torch.inference_mode():
        plain, found = (
            seconds(lambda m=m: [m(x) for _ in range(20)], device, 5) / 20 for m in (layer, stored)
        )
    what = f"{layer.in_features} to {layer.out_features}, {len(x)} rows"
    yield row(
        f"{name}, a layer of {what}: dense {1e6 * plain:.0f} us, 2:4", 1e6 * found, "us",
        times=plain / found,
    )  # fmt: skip
