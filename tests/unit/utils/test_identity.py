"""Functions and objects are told apart by what they do, not by where they lie in memory."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsal.utils.identity import identity_of

SCALE = 0.5
CLASSES = {"a": 1.0}


def scaled(outputs, labels):
    return SCALE * F.cross_entropy(outputs, labels, reduction="none")


def weighted(outputs, labels):
    return CLASSES["a"] * F.cross_entropy(outputs, labels, reduction="none")


def through_another(outputs, labels):
    return scaled(outputs, labels)


def made(scale):
    calls, total = [], 0

    def loss(outputs, labels):
        nonlocal total
        total += 1
        calls.append(total)
        return scale * F.cross_entropy(outputs, labels, reduction="none")

    return loss


class Counting:
    def __init__(self, weight):
        self.weight = weight
        self.calls = 0

    def __call__(self, outputs, labels):
        self.calls += 1
        return self.weight * F.cross_entropy(outputs, labels, reduction="none")


X, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
PAIRS = {
    "closures": (made(1.0), made(2.0)),
    "objects": (Counting(1.0), Counting(2.0)),
    "tensors": (Counting(torch.ones(2)), Counting(torch.zeros(2))),
    "partial": (functools.partial(F.cross_entropy, label_smoothing=0.1), F.cross_entropy),
    "partial values": tuple(
        functools.partial(F.cross_entropy, reduction="none", label_smoothing=s) for s in (0.1, 0.2)
    ),
    "code": (lambda o, y: o[:, 0] + 1, lambda o, y: o[:, 0] + 2),
    "library": (F.cross_entropy, F.nll_loss),
    "modules": (nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss()),
    "attributes": (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss()),
    "weights": (nn.CrossEntropyLoss(torch.ones(3)), nn.CrossEntropyLoss(torch.zeros(3))),
    "methods": (Counting(1.0).__call__, Counting(2.0).__call__),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_does_something_else_has_another_identity(name):
    one, other = PAIRS[name]
    assert identity_of(one) == identity_of(one)
    assert identity_of(one) != identity_of(other)


@pytest.mark.parametrize("make", [lambda: made(1.0), lambda: Counting(1.0)])
def test_counting_calls_is_not_another_identity(make):
    loss = make()
    before = identity_of(loss)
    loss(X, Y)
    assert identity_of(loss) == before == identity_of(make())


@pytest.mark.parametrize("loss", [scaled, through_another, weighted])
def test_values_of_the_module_count(loss, monkeypatch):
    before = identity_of(loss)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 0.25)
    monkeypatch.setitem(CLASSES, "a", 2.0)
    assert identity_of(loss) != before


def test_plain_values_are_themselves():
    assert [identity_of(v) for v in ("cross-entropy", None, 3)] == ["cross-entropy", "None", "3"]


def test_values_that_contain_themselves_end():
    cyclic: list = [1]
    cyclic.append(cyclic)
    assert identity_of(Counting(cyclic)).startswith(f"{__name__}.Counting ")


def test_processes_agree(tmp_path, python_env):
    (tmp_path / "losses.py").write_text(
        "import torch\nKINDS = {'b', 'a', 'c'}\n"
        "class Loss:\n"
        "    def __init__(self):\n        self.kinds = frozenset(KINDS)\n"
        "    def __call__(self, o, y):\n        return o.sum(1) if 'a' in {'a', 'z'} else y\n"
    )
    code = "import losses, fastsal.utils.identity as i; print(i.identity_of(losses.Loss()))"
    said = set()
    for seed in ("1", "2"):
        # The second process reads the compiled file that the first one wrote.
        env = {**python_env, "PYTHONHASHSEED": seed}
        said.add(
            subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, env=env,
                capture_output=True, text=True, check=True,
            ).stdout
        )  # fmt: skip
    assert len(said) == 1
