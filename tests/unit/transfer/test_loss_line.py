"""Losses along a line between two states of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.transfer import measure
from fastsal.transfer.loss_line import measure_line

pytestmark = pytest.mark.usefixtures("one_thread")


class Quadratic(nn.Module):
    """Loss `½ wᵀ A w`."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))

    A = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)

    def loss(self):
        w = self.w.detach()
        return float(w @ self.A @ w) / 2


def value(model):
    return 1.0 - model.loss(), model.loss()


@pytest.mark.parametrize("points", [2, 3, 11])
def test_a_quadratic_is_a_parabola_along_the_line(points):
    model = Quadratic()
    a = model.w.detach().clone()
    b = torch.tensor([0.0, 5.0, 0.25], dtype=torch.float64)
    found = measure_line(model, {"w": model.w}, {"w": b}, value, points=points)
    assert [p.t for p in found] == pytest.approx([i / (points - 1) for i in range(points)])
    for point in found:
        w = (1 - point.t) * a + point.t * b
        assert point.loss == pytest.approx(float(w @ model.A @ w) / 2, rel=1e-12)
        assert point.accuracy == pytest.approx(1 - point.loss)
    assert torch.equal(model.w, a)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))
    model[1].running_mean.uniform_()
    return model


def other_state(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p))
        other[1].running_var.uniform_(1, 2)
        other[1].num_batches_tracked.fill_(9)
    return other.state_dict()


def test_ends_are_the_states_and_the_middle_is_between_them():
    model = net().train()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    end = other_state(model)
    seen = []

    def see(moved):
        moved.eval()
        seen.append({k: v.clone() for k, v in moved.state_dict().items()})
        return 0.5, torch.tensor(1.0), 7

    # The model's own state, which moves while the line is walked.
    found = measure_line(model, model.state_dict(), end, see, points=5)
    assert [(p.t, p.loss, p.accuracy) for p in found] == [
        (t, 1.0, 0.5) for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert all(torch.equal(seen[0][k], start[k]) for k in start)
    assert all(torch.equal(seen[-1][k], end[k]) for k in start)
    for k in start:
        if start[k].is_floating_point():
            torch.testing.assert_close(seen[1][k], 0.75 * start[k] + 0.25 * end[k])
    assert [int(s["1.num_batches_tracked"]) for s in seen] == [0, 0, 9, 9, 9]
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_losses_at_the_ends_are_those_of_the_models():
    model = net().eval()
    batches = [(torch.randn(20, 1, 5, 5), torch.arange(20) % 3)]
    end = other_state(model)
    last = copy.deepcopy(model)
    last.load_state_dict(end)
    found = measure_line(model, model.state_dict(), end, lambda m: measure(m, batches), points=3)
    for point, m in ((found[0], model), (found[2], last)):
        want = measure(m, batches)
        assert (point.accuracy, point.loss) == (want.accuracy, want.loss)
    assert found[1].loss not in (found[0].loss, found[2].loss)


def test_an_error_leaves_the_model_as_it_was():
    model = net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def fails(moved):
        moved.eval()
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more")
        return 0.0, 0.0

    with pytest.raises(RuntimeError, match="no more"):
        measure_line(model, before, other_state(model), fails)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[1].training


def test_what_is_not_taken():
    model = Quadratic()
    state = {"w": torch.zeros(3)}
    cases = [
        (
            {"start": {"v": torch.zeros(3)}},
            UnknownParameter,
            "^start: 'v' is not in the state of the model",
        ),
        (
            {"end": {"w": torch.zeros(2)}},
            InvalidArgument,
            r"^end: shape of 'w' must be \[3\], got \[2\]",
        ),
        ({"end": {}}, UnknownParameter, "^start and end must have the same names; 'w' is in one"),
        ({"points": 1}, InvalidArgument, "^points must be at least 2, got 1"),
        ({"points": 2.0}, InvalidArgument, "^points must be an integer, got 2.0"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            measure_line(model, **{"start": state, "end": state, "measure": value, **change})
    assert model.w[2] == 3
