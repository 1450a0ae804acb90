"""Every instruction set of this machine passes the tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastsal import _core

HERE = Path(__file__)
USED = _core.build_info()[1].split("+")[0].replace("avx512f", "avx512").replace("neon", "portable")
OTHERS = [isa for isa in _core.instruction_sets() if isa != USED]


@pytest.mark.parametrize("isa", OTHERS)
def test_other_instruction_sets(isa, python_env):
    others = sorted(str(path) for path in HERE.parent.glob("test_*.py") if path != HERE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *others],
        cwd=HERE.parents[2], capture_output=True, text=True, check=False,
        env={**python_env, "FASTSAL_ISA": isa},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
