"""The promise of the safe threshold: its bound holds, and what is promised is what is returned."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.errors import DataError, InvalidArgument
from fastsal.pruning.limits.bound import is_below, upper_bound
from fastsal.pruning.limits.limit import Limit, trusted_until
from fastsal.pruning.prune_to_limit import GRID


def bernoulli(p):
    return lambda rng, n: (rng.random(n) < p).astype(float)


def three_way(rng, n):
    """Accuracy differences: mostly none."""
    return rng.choice([-1.0, 0.0, 1.0], p=[0.01, 0.96, 0.03], size=n)


@pytest.mark.parametrize(
    ("draw", "mean", "low"),
    [
        (bernoulli(0.01), 0.01, 0.0),
        (bernoulli(0.5), 0.5, 0.0),
        (three_way, 0.02, -1.0),
        (lambda rng, n: rng.beta(0.1, 3.0, n), 0.1 / 3.1, 0.0),
    ],
)
@pytest.mark.parametrize("n", [30, 300])
def test_a_true_hypothesis_is_refuted_no_more_often_than_allowed(draw, mean, low, n):
    rng = np.random.default_rng(0)
    trials, confidence = 2000, 0.9
    wrong = sum(is_below(draw(rng, n), mean, low, 1.0, confidence) for _ in range(trials))
    # Three standard errors above the promise.
    assert wrong / trials <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / trials)


def test_the_bound_is_sharp_enough_to_be_of_use():
    rng = np.random.default_rng(1)
    zeros = upper_bound(np.zeros(1000), 0.0, 1.0, 0.95)
    # Without a single event the exact (Clopper-Pearson) bound is 1 - 0.05^(1/1000) = 0.003.
    assert 0.003 <= zeros < 0.012
    many = three_way(rng, 20_000)
    assert 0.02 < upper_bound(many, -1.0, 1.0, 0.95) < 0.03


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=50), st.floats(0.5, 0.99))
def test_bound_and_test_agree(values, confidence):
    bound = upper_bound(values, -1.0, 1.0, confidence)
    assert -1 <= bound <= 1
    if bound < 1:
        assert is_below(values, bound, -1.0, 1.0, confidence)


def test_no_images_promise_nothing():
    assert upper_bound([], 0.0, 1.0, 0.9) == 1.0


def test_values_outside_the_range_are_refused():
    with pytest.raises(InvalidArgument, match="values"):
        upper_bound([0.0, 2.0], 0.0, 1.0, 0.95)


def test_the_grid_rises():
    assert list(GRID) == sorted(set(GRID))


def test_trust_ends_at_the_first_disagreement():
    def point(sparsity, predicted, measured):
        return {
            "sparsity": sparsity,
            "predicted": predicted,
            "loss_increase": measured,
            "loss_error": 0.001,
        }

    curve = [point(0.1, 0.0, 0.001), point(0.2, 0.1, 0.15), point(0.3, 0.2, 1.0)]
    assert trusted_until(curve) == 0.2
    assert trusted_until([point(0.1, None, 0.0)]) is None


@pytest.fixture
def trained():
    """A small network that has learnt something, and images that it has not seen."""
    torch.manual_seed(0)
    centres = torch.randn(4, 12)
    y = torch.randint(0, 4, (1600,))
    x = centres[y] + 0.7 * torch.randn(1600, 12)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:400]), y[:400]).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval(), (x[400:], y[400:])


@pytest.mark.parametrize(
    "limit", [{"max_accuracy_drop": 0.03}, {"max_loss_increase": 0.1}, {"max_accuracy_drop": 0.1}]
)
@pytest.mark.parametrize("damping", [1e-3, "auto"])
def test_what_is_returned_keeps_the_limit(trained, limit, damping):
    model, data = trained
    result = fastsal.prune(model, [data], damping=damping, **limit)
    safety = result.safety
    assert 0 < safety.sparsity < 1
    assert abs(result.masks.sparsity - safety.sparsity) < 1e-2
    result.masks.verify(model)
    passed = [p for p in safety.curve if p["sparsity"] <= safety.sparsity]
    assert all(p["keeps"] and p["upper"] <= safety.limit.most + 2e-4 for p in passed)
    assert not safety.curve[len(passed)]["keeps"]
    assert safety.images == 300
    json.dumps(safety.as_dict())


def test_other_images_can_be_held_out(trained):
    model, (x, y) = trained
    batches, held_out = [(x[:600], y[:600])], [(x[600:], y[600:])]
    result = fastsal.prune(model, batches, damping=1e-3, max_accuracy_drop=0.05, held_out=held_out)
    assert result.safety.images == 600
    assert result.history[0].samples == 600


def test_without_statistics_too(trained):
    model, data = trained
    result = fastsal.prune(
        model, [data], criterion="magnitude", compensate=False, max_accuracy_drop=0.1
    )
    assert result.safety.sparsity > 0
    assert result.safety.trusted_until is None
    result.masks.verify(model)


def test_a_limit_that_nothing_keeps_leaves_the_model_whole(trained):
    model, (x, y) = trained
    before = [p.detach().clone() for p in model.parameters()]
    result = fastsal.prune(model, [(x[:80], y[:80])], damping=1e-3, max_accuracy_drop=1e-4)
    assert result.safety.sparsity == result.masks.sparsity == 0
    for old, new in zip(before, model.parameters()):
        torch.testing.assert_close(old, new, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_accuracy_drop": 0.1, "max_loss_increase": 0.1}, "both"),
        ({"max_accuracy_drop": 0.0}, r"max_accuracy_drop must be in \(0, 1\), got 0"),
        ({"max_accuracy_drop": 1.5}, r"max_accuracy_drop must be in \(0, 1\), got 1.5"),
        ({"max_loss_increase": -1.0}, "max_loss_increase"),
        ({"max_accuracy_drop": 0.1, "confidence": 1.0}, "confidence"),
        ({"max_accuracy_drop": 0.1, "sparsity": 0.5}, "exclude sparsity:"),
        ({"max_accuracy_drop": 0.1, "rounds": 2}, "one round"),
        ({"max_accuracy_drop": 0.1, "floor": 2.0}, "floor"),
        ({"sparsity": 0.5, "held_out": []}, "held_out"),
    ],
)
def test_bad_arguments_leave_the_model_alone(trained, given, match):
    model, data = trained
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InvalidArgument, match=match):
        fastsal.prune(model, [data], **given)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))


def test_the_test_needs_labels(trained):
    model, (x, _) = trained
    with pytest.raises(DataError, match="labeled"):
        fastsal.prune(model, [(x, None)], curvature="sampled", max_accuracy_drop=0.1)


def test_limit_of_nothing_is_none():
    assert Limit.of(None, None, 0.95) is None


def test_the_command_says_what_it_promises(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(160) % 4
    x = (rng.integers(0, 80, (160, 8, 8)) + 40 * y[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))\n"
    )
    arguments = [
        "prune",
        f"{tmp_path}/net.py:net",
        *("--data", f"{tmp_path}/data.npz", "--max-accuracy-drop", "0.2"),
        *("--damping", "1e-3", "--out", f"{tmp_path}/run", "--quiet"),
    ]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert "with confidence 0.95 (40 held-out images)" in " ".join(result.output.split())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["safety"]["limit"] == {"kind": "accuracy", "most": 0.2, "confidence": 0.95}
    assert report["safety"]["curve"]
