"""Variants of pruning compared with plain `prune`: `python -m benches.ideas`.

The ResNet-20 of `examples/` is pruned on the calibration images of `benches.quality` without
fine-tuning. The table shows the mean difference from plain `prune` on the same images, in
percentage points of accuracy on `cifar10_test`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsal
from benches.quality.subjects import DATA_HELP, ROOT, accuracy, drawn, load_resnet20

Images = tuple[Tensor, Tensor]
# idea(model, images, sparsity) prunes the model in place
Idea = Callable[[nn.Module, Images, float], object]
DAMPING = (1e-7, 1e-6, 1e-5, 1e-4)


def with_options(**options: object) -> Idea:
    """Return the idea of calling `prune` with the given options."""
    return lambda model, images, s: fastsal.prune(model, [images], s, **options)


class Fresh:
    """Batches that draw other training images on each iteration."""

    def __init__(self, train: Images, n: int) -> None:
        self.train, self.n, self.turn = train, n, 0

    def __iter__(self) -> Iterator[Images]:
        self.turn += 1
        return iter([drawn(*self.train, 100 + self.turn, self.n)])


def linear_goals(sparsity: float, rounds: int) -> list[float]:
    """Return the sparsity after each round if every round prunes the same number of weights."""
    return [sparsity * r / rounds for r in range(1, rounds + 1)]


def linearly(model: nn.Module, images: Images, sparsity: float) -> object:
    """Prune in eight rounds of the same number of weights."""
    with mock.patch("fastsal.pruning.prune.rising_goals", linear_goals):
        return fastsal.prune(model, [images], sparsity, rounds=8)


def on_held_out(model: nn.Module, images: Images, attempt: Callable[[nn.Module, float], object]):
    """Apply the attempt whose λ has the lowest loss on one image in eight, held out."""
    best = None
    for damping in DAMPING:
        tried = copy.deepcopy(model)
        attempt(tried, damping)
        with torch.no_grad():
            value = float(F.cross_entropy(tried(images[0][::8]), images[1][::8]))
        if best is None or value < best[0]:
            best = (value, tried.state_dict())
    model.load_state_dict(best[1])


def kept_in(images: Images) -> Images:
    """Return the images that `on_held_out` does not hold out."""
    keep = torch.arange(len(images[1])) % 8 != 0
    return images[0][keep], images[1][keep]


def newton_target(step: float) -> Idea:
    """Return the idea of pruning `θ - step A⁻¹ g`, the minimum of `gᵀδ + δᵀAδ/2`."""

    def idea(model: nn.Module, images: Images, sparsity: float) -> None:
        fisher = fastsal.collect(model, [kept_in(images)])
        mean = fisher.mean_gradient()

        def attempt(tried: nn.Module, damping: float) -> None:
            newton(tried, fisher, mean, damping, step)
            scores = fastsal.score(tried, fisher, "obs-greedy", damping)
            fastsal.compensate(tried, fisher, fastsal.rank(scores, sparsity), damping)

        on_held_out(model, images, attempt)

    return idea


def newton(model, fisher, mean, damping: float, step: float, masks=None) -> None:
    """Update the kept weights by `θ -= step A⁻¹ g`, block by block."""
    parameters = dict(model.named_parameters())
    for name in fisher.names:
        blocks = fisher.blocks(name)
        size = blocks.shape[1]
        g = mean[name].reshape(-1)
        kept = torch.ones_like(g) if masks is None else masks[name].reshape(-1).double()
        pad = len(blocks) * size - len(g)
        g, kept = (F.pad(x, (0, pad)).reshape(-1, size) for x in (g * kept, kept))
        a = blocks * kept[:, :, None] * kept[:, None, :]
        a += damping * torch.eye(size, dtype=torch.float64)
        move = torch.linalg.solve(a, g).reshape(-1)[: parameters[name].numel()]
        with torch.no_grad():
            parameters[name].sub_(step * move.reshape(parameters[name].shape).float())


def relative_damping(model: nn.Module, images: Images, sparsity: float) -> None:
    """Prune with a λ for each parameter, proportional to its mean `F_jj`."""
    fisher = fastsal.collect(model, [kept_in(images)])
    level = {name: float(value.mean()) for name, value in fisher.diagonal().items()}
    middle = statistics.geometric_mean(level.values())

    def attempt(tried: nn.Module, damping: float) -> None:
        scores = {}
        for name in fisher.names:
            own = damping * level[name] / middle
            scores[name] = fastsal.score(tried, fisher, "obs-greedy", own)[name]
        masks = fastsal.rank(scores, sparsity)
        for name in fisher.names:
            own = damping * level[name] / middle
            fastsal.compensate(tried, fisher, {name: masks[name]}, own)

    on_held_out(model, images, attempt)


def natural_gradient_after(model: nn.Module, images: Images, sparsity: float) -> None:
    """Prune, then apply a damped Newton step to kept weights; held-out loss selects λ and step."""
    result = fastsal.prune(model, [images], sparsity)
    fisher = fastsal.collect(model, [kept_in(images)])
    mean = fisher.mean_gradient()
    held = images[0][::8], images[1][::8]
    start = copy.deepcopy(model.state_dict())
    best = (float("inf"), start)
    for damping in (1e-5, 1e-4, 1e-3, 1e-2):
        for step in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
            model.load_state_dict(start)
            newton(model, fisher, mean, damping, step, result.masks)
            with torch.no_grad():
                value = float(F.cross_entropy(model(held[0]), held[1]))
            if value < best[0]:
                best = (value, copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[1])
    result.masks.verify(model)


def ideas(train: Images, n: int) -> dict[str, dict[str, Idea]]:
    """Return the ideas, grouped by the plain call that they are compared with."""
    return {
        "one round": {
            "plain": with_options(),
            "labels drawn from the model": with_options(curvature="sampled"),
            "blocks of 32": with_options(block_size=32),
            "blocks of 128": with_options(block_size=128),
            "blocks of 256": with_options(block_size=256),
            "sums in float64": with_options(precision="float64"),
            "batch normalization recalibrated if that helps": with_options(recalibrate=True),
            "the same sparsity in every layer": with_options(scope="layer"),
            "sparsities by layer shape (ERK)": with_options(scope="erk"),
            "at least a twentieth of each layer kept": with_options(floor=0.05),
            "λ in proportion to each layer's Fisher": relative_damping,
            "the gradient term, whole step": newton_target(1.0),
            "the gradient term, a tenth of the step": newton_target(0.1),
            "a Newton step of the kept weights after pruning": natural_gradient_after,
        },
        "eight rounds": {
            "plain": with_options(rounds=8),
            "sixteen rounds": with_options(rounds=16),
            "as many weights in every round": linearly,
            "other images in every round": lambda model, images, s: fastsal.prune(
                model, Fresh(train, n), s, rounds=8
            ),
            "labels drawn from the model": with_options(rounds=8, curvature="sampled"),
            "blocks of 128": with_options(rounds=8, block_size=128),
            "batch normalization recalibrated if that helps": with_options(
                rounds=8, recalibrate=True
            ),
        },
    }


def main() -> None:
    """Run all ideas and print the difference of each from the plain call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help=DATA_HELP
    )
    parser.add_argument("--samples", type=int, default=1024, help="number of calibration images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the draws")
    parser.add_argument("--only", default="", help="run only groups whose name contains this text")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    model, train, test = load_resnet20(given.data)
    sparsities = {"one round": (0.7, 0.8, 0.9), "eight rounds": (0.8, 0.9)}
    found = []
    start = time.perf_counter()
    for group, members in ideas(train, given.samples).items():
        if given.only not in group:
            continue
        for name, idea in members.items():
            for sparsity in sparsities[group]:
                values = []
                for seed in given.seeds:
                    pruned = copy.deepcopy(model)
                    idea(pruned, drawn(*train, seed, given.samples), sparsity)
                    values.append(accuracy(pruned, test))
                found.append(
                    {"group": group, "idea": name, "sparsity": sparsity, "accuracy": values}
                )
                spent = time.perf_counter() - start
                print(f"{spent:6.0f} s  {group}, {name}, {sparsity}: {values}", flush=True)
    plain = {(f["group"], f["sparsity"]): f["accuracy"] for f in found if f["idea"] == "plain"}
    for group in dict.fromkeys(f["group"] for f in found):
        columns = sparsities[group]
        print(f"\n| {group} | " + " | ".join(map(str, columns)) + " |")
        print("|---" * (1 + len(columns)) + "|")
        for name in dict.fromkeys(f["idea"] for f in found if f["group"] == group):
            cells = []
            for f in found:
                if (f["group"], f["idea"]) == (group, name):
                    base = plain[group, f["sparsity"]]
                    gain = [100 * (a - b) for a, b in zip(f["accuracy"], base, strict=True)]
                    mean = statistics.mean(f["accuracy"])
                    cells.append(
                        f"{mean:.3f}" if name == "plain" else f"{statistics.mean(gain):+.1f}"
                    )
            print(f"| {name} | " + " | ".join(cells) + " |")
    if given.out:
        asked = {k: v for k, v in vars(given).items() if k not in ("data", "out")}
        given.out.write_text(json.dumps({"asked": asked, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
