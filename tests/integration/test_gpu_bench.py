"""`python -m benches.gpu`: it runs to its end on a CPU, and a part that fails loses no other."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def bench(env, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "benches.gpu", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip


def test_every_part_runs_on_a_cpu(python_env, tmp_path):
    out = tmp_path / "result.json"
    done = bench(python_env, "--smoke", "--one-process", "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    parts = {part["part"]: part for part in found["parts"]}
    assert list(parts) == ["card", "tests", "sums", "passes", "peer", "core", "masks", "2:4"]
    for name, part in parts.items():
        missing = name == "peer" and find_spec("sparseml") is None
        assert part["status"] == ("skipped" if missing else "done"), part
        assert bool(part["rows"]) != missing
    assert not [row for part in parts.values() for row in part["rows"] if "failed" in row["name"]]
    errors = [row["figure"] for row in parts["sums"]["rows"] if row["name"].endswith(": error")]
    assert len(errors) == (5 if find_spec("triton") else 3)
    assert max(errors) < 1e-6
    same = [row["figure"] for row in parts["masks"]["rows"] if "equal to the CPU's" in row["name"]]
    assert same[0] > 0.999
    assert found["machine"]["device"] == "cpu"
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert "masks: done" in done.stdout


def test_parts_run_in_processes_of_their_own(python_env, tmp_path):
    out = tmp_path / "result.json"
    done = bench(python_env, "--smoke", "--device", "cpu", "--only", "card", "core", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert [part["status"] for part in found["parts"]] == ["done", "done"]
    assert found["parts"][1]["rows"]


FAILING = """
import sys
from benches.gpu import __main__ as bench

def broken(size, device):
    yield {"name": "first", "figure": 1.0, "unit": "s"}
    raise ZeroDivisionError("no more")

def missing(size, device):
    raise ImportError("pip install it")
    yield

bench.PARTS.update(sums=(broken, 9), peer=(missing, 9))
bench.main()
"""


def test_a_failure_is_recorded_and_the_status_is_1(python_env, tmp_path):
    out = tmp_path / "result.json"
    given = ["--smoke", "--one-process", "--device", "cpu", "--out", str(out), "--only"]
    done = subprocess.run(
        [sys.executable, "-c", FAILING, *given, "card", "sums", "peer", "core"],
        cwd=ROOT, capture_output=True, text=True, check=False, env=python_env,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert [part["status"] for part in parts] == ["done", "failed", "skipped", "done"]
    assert parts[1]["reason"] == "ZeroDivisionError: no more"
    assert [row["name"] for row in parts[1]["rows"]] == ["first"]
    assert parts[2]["reason"] == "pip install it"
    assert "failed: sums" in done.stdout


PRODUCTS = """
import torch
from benches.gpu import sums

rows = torch.randn(300, 640, generator=torch.Generator().manual_seed(0))
leading = sums.rounded(rows)
assert torch.equal(sums.rounded(leading), leading)
assert float(((leading - rows) / rows).abs().max()) <= 2**-11
# As the device does it: TF32 numbers alone enter a product.
a, b = leading.double(), sums.rounded((rows - leading) * 2).double()
exact = rows.double().mT @ rows.double()
found = a.mT @ a + a.mT @ b
found = (found + found.mT) / 2
scale = exact.diagonal().sqrt()
assert float(((found - exact).abs() / (scale[:, None] * scale)).max()) < 2**-22
assert float(((a.mT @ a - exact).abs() / (scale[:, None] * scale)).max()) > 2**-16
"""


def test_two_products_of_tf32_are_as_accurate_as_one_of_float32(python_env):
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        cwd=ROOT, capture_output=True, text=True, check=False, env=python_env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_full_size_is_refused(python_env):
    done = bench(python_env, "--only", "card")
    assert done.returncode == 2
    assert "needs a GPU of CUDA, got cpu; --smoke runs on the CPU" in done.stderr
