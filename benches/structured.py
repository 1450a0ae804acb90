"""Units removed from a ViT-S/14: `python -m benches.structured [--data FOLDER] [--out FILE]`.

The self-supervised ViT-S/14 of `examples/` at 126 pixels loses a part of its MLP units or heads,
without training, by statistics of a few training images of CIFAR-10. Columns: the relative squared
error of the features of test images, and the accuracy of a ridge head that was fitted on the dense
features of other training images. `--out` is read first: cases that it has are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastsal
from fastsal.models.features import features
from fastsal.models.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastsal.pruning.structured.elimination import eliminate
from fastsal.transfer.ridge import solve_ridge
from fastsal.utils.machine import versions

ROOT = Path(__file__).resolve().parents[1]
SIDE = 126
RIDGES = (1e-3, 1e-2, 1e-1)

# Names of cases and their arguments; the sparsity comes before.
CASES: dict[str, dict[str, Any]] = {
    "joint, global": {},
    "joint, same width": {"scope": "layer"},
    "joint, global by relative error": {"weighting": "relative"},
    "joint, same width, no fold": {"scope": "layer", "compensate": False},
    "variance, same width": {"scope": "layer", "criterion": "variance"},
    "variance, same width, no fold": {
        "scope": "layer", "criterion": "variance", "compensate": False,
    },
    "magnitude, same width": {"scope": "layer", "criterion": "magnitude"},
    "magnitude, same width, no fold": {
        "scope": "layer", "criterion": "magnitude", "compensate": False,
    },
    "random, same width": {"scope": "layer", "criterion": "random"},
}  # fmt: skip


def images(folder: Path, part: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a draw of images, normalized and resized, and their labels."""
    with np.load(folder / f"cifar10_{part}.npz", allow_pickle=False) as file:
        order = torch.randperm(len(file["y"]), generator=torch.Generator().manual_seed(seed))
        x = torch.from_numpy(file["x"])[order[:count]].permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(file["y"])[order[:count]].long()
    x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
    return (x - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
        1, 3, 1, 1
    ), y


def all_features(model: nn.Module, x: Tensor) -> Tensor:
    """Return features in batches."""
    return torch.cat([features(model, some) for some in x.split(32)])


class Heads:
    """A ridge head on the dense features; the ridge with the best leave-one-out accuracy."""

    def __init__(self, f: Tensor, y: Tensor) -> None:
        counts = torch.bincount(y, minlength=10)
        found = []
        for ridge in RIDGES:
            weight, bias, _, left_out = solve_ridge(f, y, counts, ridge)
            found.append((float((left_out.argmax(1) == y).double().mean()), weight, bias))
        _, self._weight, self._bias = max(found, key=lambda each: each[0])

    def accuracy(self, f: Tensor, y: Tensor) -> float:
        """Return the accuracy on features."""
        return float(((f.double() @ self._weight.T + self._bias).argmax(1) == y).double().mean())


def elimination(units: int) -> dict[str, Any]:
    """Return the seconds of a greedy elimination, and whether a smaller one equals a plain loop."""

    def problem(size: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(size)
        mixed = torch.randn(size, size, generator=draw, dtype=torch.float64)
        a = mixed @ mixed.T / size + 1e-3 * torch.eye(size, dtype=torch.float64)
        return a, torch.randn(size // 4, size, generator=draw, dtype=torch.float64)

    a, w = problem(units // 6)
    inverse, quadratic, left = torch.linalg.inv(a), w.T @ w, torch.ones(len(a), dtype=torch.bool)
    order, costs = eliminate(inverse.clone(), quadratic.clone(), len(a))
    for unit, cost in zip(order.tolist(), costs.tolist(), strict=True):
        found = (quadratic.diagonal() / inverse.diagonal()).masked_fill(~left, torch.inf)
        assert int(found.argmin()) == unit
        assert abs(float(found.min()) - cost) <= 1e-8 * cost
        step = inverse[unit] / inverse[unit, unit]
        row, own = quadratic[unit].clone(), float(quadratic[unit, unit])
        inverse = inverse - torch.outer(inverse[:, unit], step)
        quadratic = quadratic - torch.outer(row, step) - torch.outer(step, row)
        quadratic += own * torch.outer(step, step)
        left[unit] = False
    a, w = problem(units)
    quadratic = w.T @ w
    start = time.perf_counter()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(a))
    middle, own = time.perf_counter(), time.process_time()
    eliminate(inverse, quadratic, units)
    return {
        "units": units,
        "inverse, seconds": round(middle - start, 2),
        "elimination, seconds": round(time.perf_counter() - middle, 2),
        "elimination, seconds of processors": round(time.process_time() - own, 2),
    }


def main() -> None:
    """Run the cases that the file does not have, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--samples", type=int, default=128, help="images of the statistics")
    parser.add_argument("--head", type=int, default=800, help="images of the head")
    parser.add_argument("--test", type=int, default=400, help="test images")
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--structure", default="mlp", choices=["mlp", "heads"])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--refit", type=int, default=0, help="steps of refitting")
    parser.add_argument("--cache", type=Path, help="file for the dense features")
    parser.add_argument(
        "--elimination", type=int, metavar="UNITS", help="time a greedy elimination and stop"
    )
    given = parser.parse_args()
    if given.elimination is not None:
        print(elimination(given.elimination))
        return
    spec = f"{ROOT / 'examples' / 'vit_small_dino.py'}:vit_small"
    model = fastsal.load_model(spec, weights=given.data / "vit_small_dino.safetensors").float()
    x, y = images(given.data, "train", given.samples + given.head, given.seed)
    batches = [(x[: given.samples], y[: given.samples])]
    test, labels = images(given.data, "test", given.test, given.seed)
    if given.cache is not None and given.cache.is_file():
        fitted, dense = torch.load(given.cache)
    else:
        fitted, dense = all_features(model, x[given.samples :]), all_features(model, test)
        if given.cache is not None:
            torch.save((fitted, dense), given.cache)
    heads = Heads(fitted, y[given.samples :])
    done: dict[str, Any] = {}
    if given.out is not None and given.out.is_file():
        done = json.loads(given.out.read_text())
    rows = done.setdefault("cases", {})
    done["dense accuracy"] = heads.accuracy(dense, labels)
    done["machine"] = versions()
    done["images"] = {"statistics": given.samples, "head": given.head, "test": given.test}
    print(f"dense: {done['dense accuracy']:.4f}")
    for sparsity in given.sparsity:
        for name in given.only:
            key = f"{given.structure} {sparsity:g}: {name}"
            key += f", damping {given.damping:g}" if given.damping != 1e-3 else ""
            key += f", {given.refit} steps of refitting" if given.refit else ""
            key += f", draw {given.seed}" if given.seed else ""
            if key not in rows:
                pruned, start = copy.deepcopy(model), time.perf_counter()
                result = fastsal.prune_structure(
                    pruned,
                    batches,
                    sparsity,
                    structure=given.structure,
                    damping=given.damping,
                    refit=fastsal.Refit(steps=given.refit) if given.refit else None,
                    **CASES[name],
                )
                seconds = time.perf_counter() - start
                f = all_features(pruned, test)
                rows[key] = {
                    "feature error": float((f - dense).square().sum() / dense.square().sum()),
                    "accuracy": heads.accuracy(f, labels),
                    "widths": [after for _, after in result.widths.values()],
                    "parameters": result.after.parameters,
                    "macs": result.after.macs,
                    "seconds": round(seconds, 1),
                }
                if given.out is not None:
                    given.out.write_text(json.dumps(done, indent=1) + "\n")
            row = rows[key]
            print(f"{key:60s} {row['feature error']:.4f} {row['accuracy']:.4f} {row['seconds']} s")


if __name__ == "__main__":
    main()
