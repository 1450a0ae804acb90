"""Run the parts, print a table and write a result file; see `--help`."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benches.gpu.card import ROOT, card, tests
from benches.gpu.passes import masks, passes
from benches.gpu.size import SMOKE, Row, Size
from benches.gpu.solving import core, peer
from benches.gpu.sums import sums
from benches.gpu.two_of_four import two_of_four
from fastsal.utils.atomic import write_text
from fastsal.utils.devices import device_facts, resolve_device
from fastsal.utils.machine import machine, versions

# Name to what runs it, and its share of the time, in seconds.
PARTS: dict[str, tuple[Callable[[Size, torch.device], Iterator[Row]], int]] = {
    "card": (card, 30),
    "tests": (tests, 120),
    "sums": (sums, 90),
    "passes": (passes, 180),
    "peer": (peer, 60),
    "core": (core, 90),
    "masks": (masks, 60),
    "2:4": (two_of_four, 60),
}
_MOST_SECONDS = 480


def run_part(
    name: str, size: Size, device: torch.device, out: Path | None = None
) -> dict[str, Any]:
    """Run one part in this process; its rows so far are in the file `out` at any time."""
    start = time.perf_counter()
    found: dict[str, Any] = {"part": name, "status": "failed", "rows": []}

    def record(**more: Any) -> None:
        found.update(more, seconds=round(time.perf_counter() - start, 2))
        if out is not None:
            write_text(out, json.dumps(found))

    record(reason="it was stopped")
    try:
        for row in PARTS[name][0](size, device):
            if size is SMOKE:  # whose times mean nothing
                row = {k: v for k, v in row.items() if k not in ("at_most", "at_least")}
            found["rows"].append(row)
            record()
        record(status="done", reason="")
    except ImportError as missing:
        record(status="skipped", reason=str(missing))
    except Exception as error:  # whatever it is, the other parts run
        record(reason=f"{type(error).__name__}: {error}")
    return found


def run_child(name: str, smoke: bool, device: torch.device, limit: float) -> dict[str, Any]:
    """Run one part in a process of its own, which an error of the device or the limit may end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benches.gpu", "--part", name, "--out", str(out)]
        command += ["--device", str(device), *(["--smoke"] if smoke else [])]
        ending = ""
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=limit, capture_output=True, text=True, check=False
            )
            ending = done.stderr[-2000:]
        except subprocess.TimeoutExpired:
            ending = f"it did not end within {limit:.0f} s"
        if not out.exists():
            return {"part": name, "status": "failed", "rows": [], "reason": ending, "seconds": 0.0}
        found: dict[str, Any] = json.loads(out.read_text())
        if found["reason"] == "it was stopped":
            found["reason"] += f": {ending}"
        return found


def run(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run the chosen parts; the result file is complete after each of them."""
    start = time.perf_counter()
    result: dict[str, Any] = {
        "machine": {**machine(), "cores": os.cpu_count(), **device_facts(device)},
        "versions": {**versions(), "cuda": torch.version.cuda},
        "size": "smoke" if given.smoke else "full",
        "parts": [],
    }
    for name in given.only or PARTS:
        left = _MOST_SECONDS - (time.perf_counter() - start)
        if left < 15:
            found = {"part": name, "status": "skipped", "rows": [], "reason": "no time is left"}
        elif given.one_process:
            found = run_part(name, SMOKE if given.smoke else Size(), device)
        else:
            found = run_child(name, given.smoke, device, min(left, PARTS[name][1]))
        result["parts"].append(found)
        result["seconds"] = round(time.perf_counter() - start, 1)
        print("\n".join(lines_of(found)), flush=True)
        if given.out is not None:
            write_text(given.out, json.dumps(result, indent=1) + "\n")
    return result


def lines_of(part: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a part in the table."""
    reason = f": {part['reason']}" if part.get("reason") else ""
    yield f"\n{part['part']}: {part['status']} in {part.get('seconds', 0):.0f} s{reason}"
    for row in part["rows"]:
        text = f"  {row['name']:<68} {number(row['figure']):>10} {row['unit']}"
        if "times" in row:
            text += f", {number(row['times'])} times"
        for key, words in (("at_most", "at most"), ("at_least", "at least")):
            if key in row:
                met = "met" if is_met(row) else "not met"
                text += f" (aim: {words} {number(row[key])}, {met})"
        if "error" in row:
            text += f" [error {row['error']}]"
        yield text


def is_met(row: Row) -> bool:
    """Whether a figure, or its ratio if there is one, is what is aimed at."""
    value = row.get("times", row["figure"])
    return bool(value <= row.get("at_most", math.inf) and value >= row.get("at_least", -math.inf))


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def main() -> None:
    """Parse the arguments and run; the status is 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sizes, in half a minute")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the result, as JSON")
    parser.add_argument("--device", default="auto", help="device, for example cuda:1")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--one-process", action="store_true", help="run the parts in this process, without limits"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = resolve_device(given.device)
    if given.part is not None:
        run_part(given.part, SMOKE if given.smoke else Size(), device, given.out)
        return
    if device.type != "cuda" and not given.smoke:
        parser.error(f"needs a GPU of CUDA, got {device}; --smoke runs on the CPU")
    result = run(given, device)
    failed = [part["part"] for part in result["parts"] if part["status"] == "failed"]
    print(f"\n{result['seconds']:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "done"))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
