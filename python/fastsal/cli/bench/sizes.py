"""Sizes, data and ratios that the cases of `fastsal bench` share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fastsal._core as _core
from fastsal.gradients.workspace import empty_pages


@dataclass(frozen=True)
class BenchSize:
    """Sizes of the cases: `BenchSize()` runs about a minute, `BenchSize.full()` half an hour."""

    gram_weights: int = 1 << 20
    weights: int = 1 << 18
    samples: tuple[int, ...] = (256,)
    scores: int = 16_000_000
    models: tuple[str, ...] = ("resnet18",)
    images: int = 16
    pairs: int = 3

    @classmethod
    def full(cls) -> BenchSize:
        """Return the sizes of the published figures."""
        return cls(
            gram_weights=1 << 22,
            weights=1 << 20,
            samples=(256, 1024),
            scores=86_000_000,
            models=(
                "resnet50",
                "vit_small_patch16_224",
                "resnet18",
                "convnext_tiny",
                "tf_efficientnet_lite0",
            ),
            images=64,
            pairs=5,
        )


def by_instructions(avx512: float, other: float) -> float:
    """Return the limit of the instruction set that the core uses."""
    _, instructions, _ = _core.build_info()
    return avx512 if instructions.startswith("avx512") else other


def random_rows(n: int, d: int) -> Tensor:
    """Return random gradients `[n, d]` in memory allocated as by `collect`."""
    rows = empty_pages(n * d, torch.float32).view(n, d)
    return rows.normal_(0, 1e-2, generator=torch.Generator().manual_seed(0))


def faster(ours: float, theirs: float) -> float:
    """Return how many times as fast our job is."""
    return theirs / ours


def longer(ours: float, theirs: float) -> float:
    """Return how many times as long our job takes."""
    return ours / theirs
