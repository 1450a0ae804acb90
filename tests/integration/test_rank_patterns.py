"""Patterns of several ranks lie along the input axis, as those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import fastsal

from . import patterns_job

JOB = Path(patterns_job.__file__)


def test_masks_are_those_of_one_process(tmp_path, python_env):
    ranks = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(tmp_path), str(rank), "2"],
            env={**python_env, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        error = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, error[-3000:]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, name in enumerate(patterns_job.HOW):
            batches, how = patterns_job.arguments(name)
            alone = fastsal.prune(patterns_job.net(), batches, **how)
            for rank in range(2):
                found = fastsal.Masks.load(tmp_path / f"{rank}-{number}.safetensors")
                assert found == alone.masks, name
                recipes = json.loads((tmp_path / f"{rank}.json").read_text())
                assert recipes[name] == alone.masks.recipe["input_axes"]
                assert recipes[name] == {"2.weight": [4, 4, 18], "4.weight": [1, 8, 54]}
    finally:
        torch.set_num_threads(before)
