"""Heads of every kind on a published CIFAR ResNet-20, for images it was trained on and others."""

from __future__ import annotations

import pytest

from fastsal.data.opening import open_images
from fastsal.models.inputs import input_spec
from fastsal.transfer import HeadCache, Shares, Task, fit_heads, measure_tasks
from fastsal.utils.choices import HEAD_KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

# Chance is 0.1. The heads are fitted on 600 images and measured on 300.
LEAST = {
    "ridge": {"cifar10": 0.85, "mnist": 0.68},
    "knn": {"cifar10": 0.86, "mnist": 0.55},
    "probe": {"cifar10": 0.85, "mnist": 0.70},
    "own": {"cifar10": 0.88},
}


@pytest.fixture(scope="module")
def tasks(shared_data):
    found = []
    for name in ("cifar10", "mnist"):
        train = open_images(f"{name}_train.npz", root=shared_data)
        test = open_images(f"{name}_test.npz", root=shared_data)
        few = Task.cut(name, test, shares=Shares(0, 1, 0, 300 / len(test))).test
        found.append(Task.cut(name, train, test=few, shares=Shares(0.9, 0.1, 0)))
    return found


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_accuracies(kind, resnet20, tasks, tmp_path):
    spec = input_spec(resnet20, size=32)
    chosen = [task for task in tasks if task.name in LEAST[kind]]
    heads = fit_heads(resnet20, chosen, kind=kind, spec=spec, cache=HeadCache(tmp_path))
    found = measure_tasks(resnet20, chosen, heads)
    for name, least in LEAST[kind].items():
        assert found[name].samples == 300
        assert least < found[name].accuracy < 0.97, name
        assert found[name].loss < 1.2, name
    again = fit_heads(resnet20, chosen, kind=kind, spec=spec, cache=HeadCache(tmp_path))
    assert measure_tasks(resnet20, chosen, again) == found
