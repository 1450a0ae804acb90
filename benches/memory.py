"""Peak memory, time and masks within memory budgets: `python -m benches.memory [--ranks 2]`.

Each run is a child process, or several under `torchrun`. The parent reads their resident memory
from the operating system a hundred times per second between the call of `prune` and its return.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB = 2**30


def child(args: argparse.Namespace) -> None:
    """Prune once; report begin, end and results to the parent process."""
    import timm
    import torch

    import fastsal
    import fastsal.distributed

    prune: Any = fastsal.prune
    if args.ranks > 1:
        torch.distributed.init_process_group("gloo")
        prune = fastsal.distributed.prune
    torch.manual_seed(0)
    model = fastsal.load_model(args.model) if ":" in args.model else timm.create_model(args.model)
    batches: Any = Columns(args.samples, args.size, 1)
    if not args.streamed:
        images = torch.randn(args.samples, 3, args.size, args.size)
        labels = torch.randint(0, 1000, (args.samples,))
        batches = list(zip(images.split(8), labels.split(8), strict=True))
    with torch.no_grad():  # one-time allocations of the libraries
        model.eval()(next(iter(batches))[0][:2])
    damping = args.damping if args.damping == "auto" else float(args.damping)
    more: dict[str, Any] = {}
    if args.budget:
        more = {"memory_budget": int(args.budget * GIB), "scratch": args.scratch or None}
    if args.features:
        more["curvature"] = "features"
    if args.refit:
        more["refit"] = "blocks"
    if args.held_out:
        more |= {"held_out": Columns(args.held_out, args.size, 2), "max_loss_increase": 0.5}
    else:
        more["sparsity"] = 0.7
    say("begin")
    start = time.perf_counter()
    result = prune(model, batches, damping=damping, rounds=args.rounds, **more)
    seconds = time.perf_counter() - start
    say("end")
    time.sleep(1)  # until the parent has read it: later memory is not part of the run
    digest = hashlib.sha256()
    for mask in result.masks.values():
        digest.update(mask.numpy().tobytes())
    weights = hashlib.sha256()
    for p in model.parameters():
        weights.update(p.detach().numpy().tobytes())
    told = {
        "seconds": seconds,
        "masks": digest.hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
        "damping": result.history[0].damping,
        "steps": result.history[0].seconds,
        "plan": result.history[0].memory_plan,
    }
    say("told", json.dumps(told))
    if args.ranks > 1:
        torch.distributed.destroy_process_group()


class Columns:
    """Batches of images with random columns, which are drawn again on every pass.

    Args:
        samples: Number of images.
        size: Height and width in pixels.
        seed: Seed of the images.
    """

    def __init__(self, samples: int, size: int, seed: int) -> None:
        self.samples = samples
        self._size = size
        self._seed = seed

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        for start in range(0, self.samples, 8):
            n = min(8, self.samples - start)
            columns = torch.randn(n, 3, 1, self._size, generator=generator)
            images = columns.expand(-1, -1, self._size, -1).contiguous()
            yield images, torch.randint(0, 1000, (n,), generator=generator)


def say(*words: str) -> None:
    """Write a line for the parent process."""
    line = f"@ {os.getpid()} {' '.join(words)}\n"
    os.write(1, line.encode())  # in one call, so that lines of ranks do not mix


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def watched(command: list[str], ranks: int) -> dict[str, Any]:
    """Run the children; return the largest increase of memory and the reported results."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    base: dict[int, int] = {}
    peaks: dict[int, int] = {}
    running: set[int] = set()
    told: list[dict[str, Any]] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            for pid in list(running):
                peaks[pid] = max(peaks[pid], resident(pid))
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    for line in process.stdout:
        if not line.startswith("@ "):
            continue
        _, pid_text, word, *rest = line.split(maxsplit=3)
        pid = int(pid_text)
        if word == "begin":
            base[pid] = peaks[pid] = resident(pid)
            running.add(pid)
        elif word == "end":
            running.discard(pid)
        else:
            told.append(json.loads(rest[0]))
    is_over.set()
    thread.join()
    assert process.wait() == 0, "a child failed"
    assert len(told) == ranks
    assert all(t["masks"] == told[0]["masks"] for t in told), "ranks differ"
    added = max(peaks[pid] - base[pid] for pid in base)
    return {"base_gib": max(base.values()) / GIB, "added_gib": added / GIB, **told[0]}


def main() -> None:
    """Run all budgets, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="resnet50", help="name of a timm model, or file.py:function"
    )
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="*",
        default=[0, 8, 4, 2, 1],
        help="budgets in GiB; 0 for none",
    )
    parser.add_argument("--samples", type=int, default=32, help="number of random images")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--damping", default="1e-6", help="λ, or auto")
    parser.add_argument(
        "--streamed", action="store_true", help="draw the images on every pass; none is in memory"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=0,
        help="number of images that a limit on the loss is tested on; 0 prunes to 0.7",
    )
    parser.add_argument("--features", action="store_true", help="statistics of the features")
    parser.add_argument("--refit", action="store_true", help="refit the pruned model")
    parser.add_argument("--rounds", type=int, default=1, help="number of rounds")
    parser.add_argument(
        "--ranks", type=int, default=1, help="number of processes; each has the budget"
    )
    parser.add_argument(
        "--scratch",
        default=tempfile.gettempdir(),
        help="folder of the scratch file; '' for none, which is slower",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--budget", type=float, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.budget is not None:
        child(args)
        return
    rows = []
    print("| budget, GiB | planned | peak added, GiB | passes | time, s | masks and weights |")
    print("|---|---|---|---|---|---|")
    for budget in args.budgets:
        command = [sys.executable]
        if args.ranks > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={args.ranks}"]
        command += ["-m", "benches.memory", "--budget", str(budget)]
        names = ("model", "samples", "size", "damping", "rounds", "scratch", "ranks", "held_out")
        for name in names:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        flags = ("streamed", "features", "refit")
        command += [f"--{flag}" for flag in flags if getattr(args, flag)]
        row = {
            "model": args.model,
            "ranks": args.ranks,
            "budget_gib": budget or None,
            **watched(command, args.ranks),
        }
        rows.append(row)
        same = {k: row[k] == rows[0][k] for k in ("masks", "weights")}
        told = ", ".join(f"{k} {'same' if v else 'differ'}" for k, v in same.items())
        plan = row["plan"]
        cells = [
            f"{budget:g}" if budget else "none",
            f"{plan['memory'] / GIB:.2f}" if plan else "",
            f"{row['added_gib']:.2f}",
            f"{plan['passes']}" if plan else "1",
            f"{row['seconds']:.0f}",
            told,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        if args.refit:
            ratio = row["steps"]["refit"] / row["steps"]["statistics"]
            print(f"refit over collection: {ratio:.2f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
