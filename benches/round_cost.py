"""Time of a round beyond its gradients: `python -m benches.round_cost [--samples 1024]`.

A large model of random weights is pruned on random images. Reported are the seconds of the
statistics (passes and accumulation), of the choice of λ, and of scoring, ranking, compensation and
masking.
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
from fastsal.cli.bench.conditions import describe


class Noise:
    """Random images in batches of 8, generated on demand."""

    def __init__(self, samples: int, size: int) -> None:
        self.samples, self.size = samples, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(0, self.samples, 8):
            images = torch.randn(8, 3, self.size, self.size, generator=generator)
            yield images, torch.randint(0, 1000, (8,), generator=generator)


def main() -> None:
    """Time one round and print the seconds of its steps as JSON."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", help="name of a timm model")
    parser.add_argument("--samples", type=int, default=1024, help="number of random images")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--damping", default="1e-5", help="λ, or auto")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
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
