"""Channels removed from convolutional models: `python -m benches.structured_channels MODEL`.

`lite0`: EfficientNet-Lite0 (extra `demo`) on `imagenet_sample`, statistics of 150 images, accuracy
on 300 others, and speed in ONNX Runtime where it is installed. `resnet20`: the ResNet-20 of
`examples/` on CIFAR-10, statistics of 512 training images, accuracy on 3,000 test images. No
training, but for the cases that are refitted without labels. Torch-Pruning (extra `bench`) is a
peer. Cases that the file of `--out` has are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsal
from benches.quality.subjects import DATA, DATA_HELP, ROOT, drawn, load_resnet20
from benches.structured_peers import torch_pruning_taylor
from fastsal.deploy.sizes import model_size
from fastsal.utils.machine import machine, versions

CASES: dict[str, dict[str, Any]] = {
    "joint": {},
    "joint by relative error": {"weighting": "relative"},
    "joint, no fold": {"compensate": False},
    "variance": {"criterion": "variance"},
    "magnitude": {"criterion": "magnitude"},
    "magnitude, same fraction": {"criterion": "magnitude", "scope": "layer"},
    "magnitude, no fold": {"criterion": "magnitude", "compensate": False},
    "joint, refitted": {"refit": fastsal.Refit(steps=200)},
    "variance, refitted": {"criterion": "variance", "refit": fastsal.Refit(steps=200)},
    "magnitude, refitted": {"criterion": "magnitude", "refit": fastsal.Refit(steps=200)},
}
PEER = "Torch-Pruning, Taylor, no fold"
Batch = tuple[Tensor, Tensor]


def lite0(folder: Path, seed: int) -> tuple[nn.Module, list[Batch], list[Batch], int | None]:
    """Return the model, images for the statistics and for the test, and the multiple of widths."""
    model = fastsal.load_model(f"{ROOT / 'examples' / 'lite0.py'}:lite0")
    images = fastsal.load_images(folder / "imagenet_sample", class_map="imagenet")
    spec = fastsal.input_spec(model)
    batches = list(images.batches(spec, 50, samples=450, shuffle_seed=seed, workers=0))
    return model, batches[:3], batches[3:], None


def resnet20(folder: Path, seed: int) -> tuple[nn.Module, list[Batch], list[Batch], int | None]:
    """Return the same for the ResNet-20; its layers are too narrow for multiples."""
    model, train, test = load_resnet20(folder)
    calibration = drawn(*train, seed, 512)
    return model, [calibration], list(zip(test[0].split(500), test[1].split(500), strict=True)), 1


@torch.no_grad()
def accuracy(model: nn.Module, test: list[Batch]) -> float:
    """Return the top-1 accuracy."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    return right / sum(len(y) for _, y in test)


def main() -> None:
    """Run the cases of one model, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["lite0", "resnet20"])
    parser.add_argument("--data", type=Path, default=DATA, help=DATA_HELP)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--fewer", type=float, nargs="*", default=[0.15, 0.3], help="fewer MACs")
    parser.add_argument("--only", nargs="*", default=[*CASES, PEER])
    parser.add_argument("--seed", type=int, default=0, help="draw of the images")
    given = parser.parse_args()
    load = {"lite0": lite0, "resnet20": resnet20}[given.model]
    model, batches, test, multiple = load(given.data, given.seed)
    done: dict[str, Any] = {}
    if given.out is not None and given.out.is_file():
        done = json.loads(given.out.read_text())
    rows = done.setdefault(given.model, {})
    if "dense" not in rows:
        rows["dense"] = {"accuracy": accuracy(model, test)}
    done["machine"] = {**machine(), "versions": versions()}
    for fraction in given.fewer:
        for name in given.only:
            key = f"{fraction:g} fewer MACs: {name}"
            key += f", draw {given.seed}" if given.seed else ""
            if key not in rows:
                pruned = copy.deepcopy(model)
                if name == PEER:
                    torch_pruning_taylor(pruned, batches, fraction)
                else:
                    fastsal.prune_structure(
                        pruned, batches, fraction, structure="channels", budget="macs",
                        multiple=multiple, **CASES[name],
                    )  # fmt: skip
                size = model_size(pruned, test[0][0][:1], has_values=False)
                rows[key] = {
                    "accuracy": accuracy(pruned, test),
                    "parameters": size.parameters,
                    "macs": size.macs,
                }
                if name == "joint" and find_spec("onnxruntime") and given.model == "lite0":
                    found = fastsal.measure_against(
                        model, pruned, test[0][0][:8], batches=(1, 8), runtime="onnxruntime",
                        seconds=10,
                    )  # fmt: skip
                    rows[key]["speed"] = [timing.as_dict() for timing in found.timings]
                if given.out is not None:
                    given.out.write_text(json.dumps(done, indent=1) + "\n")
            speed = [each["verdict"] for each in rows[key].get("speed", [])]
            print(f"{key:45s} {rows[key]['accuracy']:.4f} {rows[key]['macs']:,} {speed}")


if __name__ == "__main__":
    main()
