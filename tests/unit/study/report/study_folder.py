"""A results folder that a study could have left: made from a smooth law and seeded noise."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

CELL = ["cell", "model", "source", "criterion", "rounds", "sparsity", "seed"]
RESULTS = [
    "study", *CELL, "samples", "damping", "sparsity_reached", "predicted_increase",
    "measured_increase", "task", "role", "head", "classes", "test_images", "dense", "pruned",
    "tuned", "status", "error", "seconds_statistics", "seconds_prune", "seconds_evaluate",
    "seconds_finetune", "peak_memory_bytes",
]  # fmt: skip
LAYERS = ["model", "source", "criterion", "rounds", "sparsity", "seed", "cell", "position", "layer",
          "weights", "pruned"]  # fmt: skip
LOSS_LINE = [*CELL, "task", "role", "path", "t", "loss", "accuracy"]
OVERLAP = ["model", "source", "seed", "task", "layer", "position", "diagonal", "eigenspace"]

# How fast accuracy falls; 1 is the slowest.
FRAGILITY = {"obs-greedy": 1.0, "block-fisher": 1.5, "diag-fisher": 3.0, "magnitude": 4.0,
             "random": 30.0}  # fmt: skip


def write_study(
    folder: Path,
    *,
    models=("resnet20",),
    sources=("cifar10",),
    criteria=tuple(FRAGILITY),
    rounds=(1,),
    sparsities=(0.5, 0.7, 0.9),
    seeds=(0, 1, 2),
    transfer=("cifar100", "mnist", "digits"),
    layers=22,
    tuned=True,
    diagnostics=False,
    failed=(),
    name="second-order transfer",
    noise=0.004,
):
    """Write the folder; `failed` holds `(criterion, sparsity, seed)`."""
    folder.mkdir(parents=True, exist_ok=True)
    results, zeros, paths, overlaps = [], [], [], []
    for model in models:
        for source in sources:
            tasks = [(source, "source"), *((t, "transfer") for t in transfer)]
            for i, criterion in enumerate(criteria):
                fragile = FRAGILITY.get(criterion, 1 + i)
                for r in rounds:
                    for sparsity in sparsities:
                        for seed in seeds:
                            key = f"{model}-{source}-{i}-r{r}-s{seed}-{sparsity:g}"
                            common = dict(
                                cell=key, model=model, source=source, criterion=criterion,
                                rounds=r, sparsity=sparsity, seed=seed,
                            )  # fmt: skip
                            rng = random.Random(key)
                            if (criterion, sparsity, seed) in failed:
                                error = "FactorizationError: <block 3> is not positive definite"
                                results.append(
                                    {"study": name, **common, "status": "failed", "error": error}
                                )
                                continue
                            hurt = fragile / math.sqrt(r) * sparsity**6 * 0.12
                            results += [
                                {**_row(rng, hurt, task, role, tuned, noise, j), **common,
                                 "study": name}
                                for j, (task, role) in enumerate(tasks)
                            ]  # fmt: skip
                            zeros += _layers(common, layers, sparsity, i)
                            if diagnostics and seed == seeds[0]:
                                paths += _paths(common, tasks, hurt, tuned)
            if diagnostics:
                overlaps += _overlaps(model, source, seeds, transfer, layers)
    _write(folder / "results.csv", RESULTS, results)
    _write(folder / "layers.csv", LAYERS, zeros)
    if diagnostics:
        _write(folder / "loss_line.csv", LOSS_LINE, paths)
        _write(folder / "overlap.csv", OVERLAP, overlaps)
    facts = {
        "format": 1,
        "name": name,
        "command": "fastsal transfer studies/cifar.toml --root data --out results/cifar",
        "fingerprint": "3f1c09aa52",
        "settings": {
            "name": name,
            "criteria": [{"name": c, "criterion": c} for c in criteria],
            "tasks": [{"name": t} for t in (*sources, *transfer)],
            "finetune": {"epochs": 5, "lr": 0.01} if tuned else None,
        },
        "machine": {"processor": "Some Processor @ 2.10GHz", "threads": 4,
                    "memory_bytes": 16 * 2**30, "system": "Linux 6.1"},
        "versions": {"fastsal": "0.1.0", "torch": "2.9.0", "timm": "1.0.22", "numpy": "2.3.4",
                     "python": "3.11.9"},
        "models": {m: {"weights": 272474, "prunable": 270896} for m in models},
        "failures": len(failed),
        "cells": len({row["cell"] for row in results}),
        "seconds": 5123.4,
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def change_table(path, change):
    """Rewrite a table after `change(rows)`, which may return other rows."""
    rows = read_table(path)
    rows = change(rows) or rows
    _write(path, list(rows[0]), rows)


def _row(rng, hurt, task, role, tuned, noise, j):
    dense = 0.916 - 0.06 * (j % 5)
    chance = 0.1
    pruned = chance + (dense - chance) * math.exp(-hurt * (1 + 0.3 * j % 1)) + rng.gauss(0, noise)
    gain = (0.6 if role == "source" else 0.35) * (dense - pruned)
    after = min(1.0, pruned + gain + rng.gauss(0, noise)) if tuned else None
    predicted = hurt * 0.8 * math.exp(rng.gauss(0, 0.1))
    return dict(
        samples=1024, damping=1e-5, sparsity_reached=0.5, predicted_increase=predicted,
        measured_increase=predicted * (1 + predicted) * math.exp(rng.gauss(0, 0.2)),
        task=task, role=role, head="own" if role == "source" else "ridge", classes=10,
        test_images=3000, dense=dense, pruned=min(max(pruned, 0.0), 1.0), tuned=after,
        status="done", error="", seconds_statistics=12.5, seconds_prune=1 + rng.random(),
        seconds_evaluate=4.2, seconds_finetune=31.0 if tuned else None,
        peak_memory_bytes=900 * 2**20,
    )  # fmt: skip


def _layers(common, count, sparsity, i):
    for p in range(count):
        share = min(max(sparsity * (0.55 + 0.9 * p / max(count - 1, 1)) + 0.02 * i, 0.0), 1.0)
        yield {**common, "position": p, "layer": f"layer{1 + p // 8}.{p % 8}.conv.weight",
               "weights": 2304, "pruned": round(2304 * share)}  # fmt: skip


def _paths(common, tasks, hurt, tuned):
    for j, (task, role) in enumerate(tasks):
        for path in ("dense-pruned", "pruned-tuned") if tuned else ("dense-pruned",):
            for k in range(5):
                t = k / 4
                loss = 0.3 + 0.1 * j + hurt * (t**2 if path == "dense-pruned" else 1 - 0.6 * t)
                yield {**common, "task": task, "role": role, "path": path, "t": t, "loss": loss,
                       "accuracy": 1 / (1 + loss)}  # fmt: skip


def _overlaps(model, source, seeds, tasks, count):
    for seed in seeds:
        for j, task in enumerate(tasks):
            for p in range(count):
                value = 0.9 - 0.1 * j - 0.3 * p / count + 0.01 * seed
                yield dict(model=model, source=source, seed=seed, task=task, position=p,
                           layer=f"layer{p}", diagonal=value,
                           eigenspace=None if p == 0 else value / 2)  # fmt: skip


def _write(path, columns, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: repr(v) if isinstance(v, float) else "" if v is None else v
                 for k, v in row.items()}
            )  # fmt: skip
