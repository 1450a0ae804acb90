"""The peak of a process, seen from outside, stays within the budget that it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


# A model that is nothing beside its images.
SMALL = """
from torch import nn

def small():
    features = nn.Conv2d(3, 8, 16, stride=16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(8, 1000))
"""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs /proc to look from outside"
)


def test_peak_is_within_the_budget(tmp_path):
    budget = 0.75
    out = tmp_path / "out.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "benches.memory", "--model", "resnet18", "--samples", "16"),
            *("--size", "64", "--budgets", "0", str(budget), "--damping", "1e-4"),
            *("--scratch", str(tmp_path), "--out", str(out)),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    free, within = json.loads(out.read_text())
    assert free["added_gib"] > budget
    assert within["added_gib"] <= budget
    assert within["plan"]["memory"] <= budget * 2**30
    assert within["masks"] == free["masks"]
    assert within["weights"] == free["weights"]


@pytest.mark.parametrize(
    "how",
    [
        # 192 images of 224 pixels are 110 MiB, and were in memory two or three times.
        ("--samples", "8", "--damping", "1e-4", "--held-out", "192"),
        # One in eight for the choice of the damping, 115 MiB.
        ("--samples", "1600", "--damping", "auto", "--streamed"),
    ],
    ids=["a limit", "damping"],
)
def test_peak_with_held_out_images_is_within_the_budget(tmp_path, how):
    budget = 128 / 1024
    out = tmp_path / "out.json"
    (tmp_path / "net.py").write_text(SMALL)
    subprocess.run(
        [
            *(sys.executable, "-m", "benches.memory", "--model", f"{tmp_path}/net.py:small"),
            *("--size", "224"),
            *(*how, "--budgets", str(budget), "--scratch", str(tmp_path), "--out", str(out)),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (within,) = json.loads(out.read_text())
    assert within["plan"]["memory"] <= budget * 2**30
    assert within["plan"]["images"] == 0
    assert within["added_gib"] <= budget
