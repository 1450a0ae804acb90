"""What a round costs on top of its gradients: `python -m benches.round_cost [--samples 1024]`.

`prune` on a large model of random weights and random images: seconds of the statistics (passes and
sums), of the choice of λ, and of scoring, ranking, compensation and masking.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import fastsal
from fastsal.cli.bench.machine import describe


class Noise:
    """`samples` images in batches of 8, made as they are asked for."""

    def __init__(self, samples: int, size: int) -> None:
        self.samples, self.size = samples, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(0, self.samples, 8):
            images = torch.randn(8, 3, self.size, self.size, generator=generator)
            yield images, torch.randint(0, 1000, (8,), generator=generator)


def main() -> None:
    """Time one round."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--damping", default="1e-5", help="λ, or auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    fastsal.set_num_threads(given.threads)
    damping = given.damping if given.damping == "auto" else float(given.damping)
    model = timm.create_model(given.model, pretrained=False).eval()
    start = time.perf_counter()
    result = fastsal.prune(model, Noise(given.samples, given.size), 0.5, damping=damping)
    whole = time.perf_counter() - start
    seconds = result.history[0].seconds
    rest = whole - seconds["statistics"]
    found = {
        "model": given.model,
        "samples": given.samples,
        "damping": given.damping,
        "seconds": seconds,
        "whole": whole,
        "on top of the gradients": rest / seconds["statistics"],
        "machine": describe(),
    }
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
