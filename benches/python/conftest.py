"""Conditions of all benches: a release build and a fixed number of threads."""

from __future__ import annotations

import os

import pytest
import torch

from fastsal import _core
from fastsal.cli.bench.conditions import describe, refuse_debug_build
from fastsal.errors import InvalidArgument

THREADS = min(2, os.cpu_count() or 1)


def pytest_configure() -> None:
    try:
        refuse_debug_build()
    except InvalidArgument as reason:
        raise pytest.UsageError(str(reason)) from None
    torch.set_num_threads(THREADS)
    _core.set_num_threads(THREADS)


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["fastsal"] = describe()
