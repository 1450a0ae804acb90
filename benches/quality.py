"""What pruning costs in accuracy: `python -m benches.quality [--data FOLDER]`.

The ResNet-20 of `examples/`, no fine-tuning, three draws of calibration images (the first is the
first N training images), accuracy on `cifar10_test`, mean and spread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastsal
from fastsal.models.loading import load_model

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPARSITIES = (0.6, 0.7, 0.8, 0.9)


def load(folder: Path) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The model, the training and the test images."""
    spec = f"{ROOT / 'examples' / 'resnet20.py'}:resnet20"
    model = load_model(spec, weights=folder / "resnet20_cifar10.safetensors")
    sets = []
    for part in ("train", "test"):
        with np.load(folder / f"cifar10_{part}.npz", allow_pickle=False) as file:
            x = torch.from_numpy(file["x"]).permute(0, 3, 1, 2).float() / 255
            x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
            sets.append((x, torch.from_numpy(file["y"]).long()))
    return model, sets[0], sets[1]


def draw(train: tuple[Tensor, Tensor], seed: int, n: int) -> tuple[Tensor, Tensor]:
    """`n` training images; seed 0 takes the first ones."""
    order = torch.arange(len(train[1]))
    if seed:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
    return train[0][order[:n]], train[1][order[:n]]


def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Top-1 on the test images."""
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(*(t.split(500) for t in test))]
    return int(sum(right)) / len(test[1])


def independent_update(
    model: nn.Module, fisher: fastsal.BlockFisher, masks: fastsal.Masks, damping: float
) -> None:
    """The update of WoodFisher and oBERT: each pruned weight as if it were the only one."""
    parameters = dict(model.named_parameters())
    for name in fisher.names:
        blocks = fisher.blocks(name)
        size = blocks.shape[1]
        inverse = torch.linalg.inv(blocks + damping * torch.eye(size, dtype=torch.float64))
        w = parameters[name].detach().reshape(-1).double()
        pad = len(blocks) * size - w.numel()
        padded = nn.functional.pad(w, (0, pad)).reshape(-1, size)
        gone = nn.functional.pad(~masks[name].reshape(-1), (0, pad)).reshape(-1, size)
        step = padded * gone / inverse.diagonal(dim1=1, dim2=2)
        moved = padded - torch.einsum("bij,bj->bi", inverse, step)
        with torch.no_grad():
            parameters[name].copy_(moved.reshape(-1)[: w.numel()].reshape(parameters[name].shape))
    masks.apply(model)


def one_shot(model, images, test, damping):
    """Rows of the table that share one set of statistics."""
    fisher = fastsal.collect(model, [images])
    for criterion, update in (
        ("magnitude", "none"),
        ("block-fisher", "none"),
        ("block-fisher", "independent"),
        ("block-fisher", "joint"),
        ("magnitude", "joint"),
        ("obs-greedy", "joint"),
    ):
        scores = fastsal.score(model, fisher, criterion, damping)
        for sparsity in SPARSITIES:
            masks = fastsal.rank(scores, sparsity)
            pruned = copy.deepcopy(model)
            if update == "joint":
                fastsal.compensate(pruned, fisher, masks, damping)
            elif update == "independent":
                independent_update(pruned, fisher, masks, damping)
            masks.apply(pruned)
            yield f"{criterion} + {update}", sparsity, accuracy(pruned, test)


def rounds(model, images, test, count, sparsities, curvature):
    """`prune` as users call it: greedy, joint, automatic damping."""
    kind = "" if curvature == "empirical" else f", curvature={curvature}"
    for sparsity in sparsities:
        pruned = copy.deepcopy(model)
        result = fastsal.prune(pruned, [images], sparsity, rounds=count, curvature=curvature)
        result.masks.verify(pruned)
        yield f"prune, {count} round(s), auto{kind}", sparsity, accuracy(pruned, test)


def main() -> None:
    """Run and print the table; write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--samples", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--no-peers", action="store_true", help="the rows of `prune` only")
    parser.add_argument("--curvature", nargs="+", default=["empirical", "features"])
    parser.add_argument("--damping", type=float, default=1e-5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model, train, test = load(given.data)
    table: dict[tuple[str, float], list[float]] = {}
    start = time.perf_counter()
    for n in given.samples:
        for seed in given.seeds:
            images = draw(train, seed, n)
            jobs = [] if given.no_peers else [one_shot(model, images, test, given.damping)]
            for count in given.rounds:
                wanted = [s for s in given.sparsities if count == 1 or s > SPARSITIES[0]]
                jobs += [
                    rounds(model, images, test, count, wanted, curvature)
                    for curvature in given.curvature
                ]
            for job in jobs:
                for name, sparsity, value in job:
                    table.setdefault((f"{name}, N={n}", sparsity), []).append(value)
                    spent = time.perf_counter() - start
                    print(
                        f"{spent:6.0f} s  {name}, N={n}, seed {seed}, {sparsity}: {value:.4f}",
                        flush=True,
                    )
    names = list(dict.fromkeys(name for name, _ in table))
    print(
        f"\n| accuracy, dense {accuracy(model, test):.3f} | "
        + " | ".join(map(str, SPARSITIES))
        + " |\n|---" * 1
        + "|---" * len(SPARSITIES)
        + "|"
    )
    for name in names:
        cells = []
        for sparsity in SPARSITIES:
            values = table.get((name, sparsity))
            spread = f" ± {statistics.stdev(values):.3f}" if values and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if given.out:
        rows = [{"row": n, "sparsity": s, "accuracy": v} for (n, s), v in table.items()]
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
