"""All tests of this folder on a device that is as strict as a GPU, and has no float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import pretended
from .conftest import PRETENDED

needs_device = pytest.mark.skipif(
    not pretended.is_supported(), reason="this PyTorch has no devices written in Python"
)


@needs_device
@pytest.mark.skipif(PRETENDED, reason="runs in the process of this test already")
def test_the_whole_folder(python_env):
    """In a process of its own, which the device is registered in for good."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)],
        cwd=here.parents[1], capture_output=True, text=True, check=False,
        env={**python_env, "FASTSAL_TEST_DEVICE": "pretended"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not PRETENDED, reason="needs the pretended device")
def test_the_device_is_strict():
    device = pretended.register()
    here, there = torch.randn(3, 4), torch.randn(3, 4, device=device)
    with pytest.raises(RuntimeError, match="on (one|the same) device"):
        here.to(device) + here
    with pytest.raises(RuntimeError, match="has no float64"):
        there.double()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    torch.testing.assert_close((there.t() @ there).cpu(), there.cpu().t() @ there.cpu())
    assert there.t().t()[1:, ::2].cpu().equal(there.cpu()[1:, ::2])


def test_the_environment_names_a_known_device():
    assert os.environ.get("FASTSAL_TEST_DEVICE", "pretended") == "pretended"
