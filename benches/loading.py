"""Images per second of reading JPEGs against torchvision: `python -m benches.loading`.

Both sides resize, crop and normalize by the same transform of timm, with the same number of worker
processes, in alternation: `ImageSet.batches` without its cache, and torchvision's `ImageFolder` in
a `DataLoader`. A second pass from the cache is timed, too, and batches of both are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import fastsal
from fastsal.cli.bench.conditions import describe

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_sample"


def main() -> None:
    """Time both sides and print the seconds of a pass and their ratio as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="folder with class folders")
    parser.add_argument("--model", default="resnet50", help="timm model whose transform is used")
    parser.add_argument("--workers", type=int, default=2, help="number of worker processes")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch")
    parser.add_argument("--repeats", type=int, default=7, help="passes of each side")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    model = timm.create_model(given.model, pretrained=False)
    resolve: Any = timm.data.resolve_model_data_config  # type: ignore[attr-defined]
    create: Any = timm.data.create_transform  # type: ignore[attr-defined]
    dataset = ImageFolder(given.data, create(**resolve(model)))
    images, spec = fastsal.load_images(given.data), fastsal.input_spec(model)
    options = {"workers": given.workers, "pin_memory": False}
    ours = images.batches(spec, given.batch_size, cache=0, **options)
    cached = images.batches(spec, given.batch_size, **options)
    peer = DataLoader(dataset, given.batch_size, num_workers=given.workers)
    is_equal = all(torch.equal(a, b) for (a, _), (b, _) in zip(cached, peer, strict=True))
    sides: dict[str, Callable[[], Iterable[Any]]] = {
        "fastsal": lambda: ours,
        "torchvision": lambda: peer,
        "fastsal, second pass": lambda: cached,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            for _batch in side():
                pass
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["fastsal"], seconds["torchvision"], strict=True)]
    found = {
        "images": len(images),
        "model": given.model,
        "workers": given.workers,
        "batches are equal": is_equal,
        "images per second": {name: round(len(images) / s) for name, s in medians.items()},
        "throughput, fastsal / torchvision": statistics.median(ratios),
        "each pass, seconds": seconds,
        "machine": describe(),
    }
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
