"""What pruning returns: attributes, plain values, short representations; numbers of any library."""

from __future__ import annotations

import inspect
import json
import typing

import numpy as np
import pytest
import torch

import fastsal
import fastsal.distributed
from fastsal.errors import InvalidArgument
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.history import RankTraffic, Round
from fastsal.pruning.prune import Arguments
from fastsal.pruning.recalibration import Recalibration
from fastsal.utils.choices import CRITERION_NAMES, EXCHANGES, SCOPES

from ..small_net import net

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(count=48):
    torch.manual_seed(1)
    return [(torch.randn(count, 3, 8, 8), torch.randint(0, 10, (count,)))]


REQUIRED = {
    "round", "sparsity", "samples", "damping", "damping_evidence", "predicted_increase", "seconds",
}  # fmt: skip


def test_rounds_as_plain_values():
    result = fastsal.prune(net(), batches(), 0.6, rounds=2)
    first, last = result.history
    assert set(first.as_dict()) == REQUIRED | {"held_out_joined"}
    assert set(last.as_dict()) == REQUIRED
    for entry in result.history:
        assert Round.from_dict(json.loads(json.dumps(entry.as_dict()))) == entry
    budget = fastsal.prune(net(), batches(), 0.6, damping=0.1, memory_budget="1GiB").history[0]
    assert set(budget.as_dict()) == REQUIRED | {"memory_plan"}


def test_a_round_with_everything_survives_json():
    entry = Round(
        round=3,
        sparsity=0.5,
        samples=12.5,
        damping=1e-3,
        damping_evidence=[(1e-3, 0.5), (1e-2, 0.75)],
        predicted_increase=0.25,
        seconds={"prune": 1.5},
        held_out_joined=False,
        memory_plan={"memory": 12},
        recalibration=Recalibration(1.0, 0.5, True),
        ranks=RankTraffic(2, {"rows": 8}, 4),
    )
    values = entry.as_dict()
    assert values["recalibration"] == {"before": 1.0, "after": 0.5, "kept": True}
    assert values["ranks"] == {"size": 2, "sent_bytes": {"rows": 8}, "in_flight_bytes": 4}
    assert Round.from_dict(json.loads(json.dumps(values))) == entry


def test_rounds_cannot_be_changed():
    entry = fastsal.prune(net(), None, 0.6, criterion="magnitude", compensate=False).history[0]
    with pytest.raises(AttributeError):
        entry.damping = 1.0


def test_representations_fit_on_a_screen():
    model, images = net(), batches(400)
    result = fastsal.prune(model, images, 0.6, rounds=3, memory_budget="1GiB")
    safe = fastsal.prune(net(), images, damping=0.1, max_loss_increase=0.5, confidence=0.6)
    report = fastsal.compensate(net(), fastsal.collect(net(), images), result.masks)
    found = [result, *result.history, result.masks, report, safe, safe.safety, safe.safety.limit]
    for each in (*found, *CRITERIA.values()):
        text = repr(each)
        assert len(text) < 24 * 80, text
        assert "tensor(" not in text
        assert " at 0x" not in text
    assert repr(result).startswith("PruneResult(Masks(3 parameters, ")
    assert "3 rounds, last Round(3, sparsity=0.6000, samples=400, damping=" in repr(result)


def test_public_signatures_show_arguments_of_users_only():
    for call in (fastsal.prune, fastsal.distributed.prune):
        assert not [name for name in inspect.signature(call).parameters if name.startswith("_")]
    assert list(inspect.signature(fastsal.prune).parameters) == list(Arguments.__annotations__)


def test_choices_are_typed():
    hints = typing.get_type_hints(fastsal.prune)
    assert set(typing.get_args(hints["criterion"])) == set(CRITERION_NAMES) == set(CRITERIA)
    assert typing.get_args(hints["scope"]) == SCOPES
    for call in (fastsal.distributed.prune, fastsal.distributed.collect):
        assert typing.get_args(typing.get_type_hints(call)["exchange"]) == EXCHANGES


NUMBERS = [
    ("sparsity", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5)]),
    ("floor", [np.float64(0.25), np.float32(0.25), torch.tensor(0.25)]),
    ("rounds", [np.int64(2), np.uint8(2), torch.tensor(2)]),
    ("samples", [np.int64(30), np.int16(30), torch.tensor(30)]),
    ("block_size", [np.int64(16), torch.tensor(16)]),
    ("seed", [np.int64(3), np.uint32(3), torch.tensor(3)]),
    ("damping", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5)]),
]


@pytest.mark.parametrize(("name", "values"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_prune_accepts_numbers_of_numpy_and_torch(name, values):
    def pruned(value):
        model = net()
        given = {"sparsity": 0.5, "damping": 0.1, "criterion": "block-fisher", name: value}
        result = fastsal.prune(model, batches(), **given)
        json.dumps([entry.as_dict() for entry in result.history] + [result.masks.recipe])
        return result.masks, model.state_dict()

    masks, state = pruned(values[0].item())
    for value in values:
        found, other = pruned(value)
        assert found == masks
        assert all(torch.equal(other[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["sparsity", "floor", "rounds", "samples", "block_size", "seed"])
@pytest.mark.parametrize("value", [True, np.bool_(True), "1", [1]])
def test_prune_rejects_what_is_no_number(name, value):
    with pytest.raises(InvalidArgument, match=f"^{name} must be a"):
        fastsal.prune(net(), batches(), **{"sparsity": 0.5, name: value})


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5)])
def test_limits_accept_numbers_of_numpy_and_torch(value):
    reports = [
        fastsal.prune(
            net(), batches(200), damping=0.1, max_loss_increase=limit, confidence=confidence
        ).safety
        for limit, confidence in ((0.5, 0.5), (value, value))
    ]
    assert reports[0] == reports[1]
    json.dumps(reports[1].as_dict())
    with pytest.raises(InvalidArgument, match="^confidence must be a number, got True"):
        fastsal.prune(net(), batches(), max_loss_increase=0.5, confidence=True)
    with pytest.raises(InvalidArgument, match="^max_accuracy_drop must be a number, got True"):
        fastsal.prune(net(), batches(), max_accuracy_drop=True)


def test_functions_accept_numbers_of_numpy_and_torch():
    model = net()
    scores = fastsal.score(model, None, "random", seed=np.int64(3))
    plain = fastsal.score(model, None, "random", seed=3)
    assert all(torch.equal(scores[name], plain[name]) for name in plain)
    for number in (np.float64(0.5), torch.tensor(0.5)):
        masks = fastsal.rank(scores, number, floor=number / 2)
        assert masks == fastsal.rank(scores, 0.5, floor=0.25)
        json.dumps(masks.recipe)
        fastsal.rank(scores, number, pattern="2:4")
    fisher = fastsal.collect(net(), batches())
    assert fastsal.rank_pattern(model, fisher, "1x4", np.float64(0.5), np.float64(0.1)) == (
        fastsal.rank_pattern(model, fisher, "1x4", 0.5, 0.1)
    )
    for bad in (True, np.bool_(True)):
        with pytest.raises(InvalidArgument, match="^sparsity must be a number"):
            fastsal.rank(scores, bad)
        with pytest.raises(InvalidArgument, match="^floor must be a number"):
            fastsal.rank(scores, 0.5, floor=bad)
        with pytest.raises(InvalidArgument, match="^seed must be an integer"):
            fastsal.score(model, None, "random", seed=bad)
        with pytest.raises(InvalidArgument, match="^ranks must be an integer"):
            fastsal.plan_memory(net(), batches(), samples=48, ranks=bad)
