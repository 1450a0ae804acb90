"""Limits of the device, and the tests of the package that need it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benches.gpu.size import GIB, Row, Size, read_rate, row, seconds

ROOT = Path(__file__).resolve().parents[2]


def card(size: Size, device: torch.device) -> Iterator[Row]:
    """Measure reading, copies from and to main memory, and products of large matrices."""
    yield row("reading", read_rate(size, device) / GIB, "GiB/s")
    if device.type == "cuda":
        there = torch.empty(size.buffer // 8, dtype=torch.uint8, device=device)
        here = torch.empty(size.buffer // 8, dtype=torch.uint8, pin_memory=True)
        for name, target, source in (("to", there, here), ("from", here, there)):
            spent = seconds(lambda t=target, s=source: t.copy_(s), device, size.repeats)
            yield row(f"copies {name} the device", here.nbytes / spent / GIB, "GiB/s")
        del there, here
    a, b = (torch.randn(size.side, size.side, device=device) for _ in range(2))
    work = 2 * size.side**3 / 1e12
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, tf32 in (("float32", False), ("TF32", True)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            yield row(f"products, {name}", work / seconds(lambda: a @ b, device, 3), "TFLOP/s")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def tests(size: Size, device: torch.device) -> Iterator[Row]:
    """Run the tests of a GPU; without one, a few of their bodies on the CPU.

    Raises:
        RuntimeError: A test fails; the message has the names of those that do.
    """
    del size
    chosen = ["-m", "gpu"] if device.type == "cuda" else ["-k", "cpu and (gradients or heads)"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *chosen],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
    for number, what in counts:
        yield row(f"tests {what}", int(number), "tests")
    if done.returncode:
        failed = re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE)
        text = "\n".join(failed) or (done.stdout + done.stderr)[-2000:]
        raise RuntimeError(f"pytest ended with status {done.returncode}\n{text}")
