"""Patterns: whole groups by joint cost, and what is taken and refused.

N:M by joint cost: `tests/parity/test_exchange.py`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import FactorizationError, InvalidArgument
from fastsal.fisher.block_fisher import sums_of
from fastsal.pruning.masks.patterns import Pattern, expand_groups, group_scores, reduce_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 5, 3)
        self.fc = nn.Linear(10, 7)


@pytest.fixture
def collected():
    """A model and statistics whose gradients are correlated along the input axis."""
    torch.manual_seed(0)
    model = Net()
    fisher = fastsal.BlockFisher({"conv.weight": (5, 6, 3, 3), "fc.weight": (7, 10)}, block_size=16)
    rows = {}
    for name, shape in fisher.shapes.items():
        shared = torch.randn(80, shape[0], 1, *shape[2:])
        rows[name] = shared + 0.5 * torch.randn(80, *shape)
    fisher.update(rows)
    return model, fisher


def dense_inverse(fisher, name, damping):
    """`A⁻¹` of a whole parameter, zero between blocks."""
    blocks = fisher.blocks(name)
    size = blocks.shape[1]
    inverse = torch.linalg.inv(blocks + damping * torch.eye(size, dtype=torch.float64))
    d = torch.Size(fisher.shapes[name]).numel()
    return torch.block_diag(*inverse)[:d, :d]


def cost(inverse, theta, out):
    """`θ_Pᵀ ([A⁻¹]_PP)⁻¹ θ_P / 2`."""
    if not out:
        return 0.0
    at = torch.tensor(out)
    return float(theta[at] @ torch.linalg.solve(inverse[at][:, at], theta[at]) / 2)


def groups_of(shape, m):
    """Flat places of the members of each group."""
    place = torch.arange(torch.Size(shape).numel()).reshape(shape[0], shape[1], -1)
    for o, i in itertools.product(range(shape[0]), range(place.shape[2])):
        for first in range(0, shape[1], m):
            yield place[o, first : first + m, i].tolist()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_whole_groups_go_by_joint_cost(collected, sparsity):
    model, fisher = collected
    masks = fastsal.rank_pattern(model, fisher, "1x4", sparsity, damping=1e-2)
    costs, kept = [], []
    for name in fisher.names:
        p = dict(model.named_parameters())[name]
        inverse, theta = dense_inverse(fisher, name, 1e-2), p.detach().double().flatten()
        flat = masks[name].flatten()
        for members in groups_of(p.shape, 4):
            states = {bool(flat[j]) for j in members}
            assert len(states) == 1
            kept.append(states.pop())
            costs.append(cost(inverse, theta, members))
    pruned = [c for c, k in zip(costs, kept) if not k]
    assert len(pruned) == round(sparsity * len(costs))
    if 0 < sparsity < 1:
        assert max(pruned) <= min(c for c, k in zip(costs, kept) if k) * (1 + 1e-5)


def test_whole_groups_by_sums_of_scores():
    scores = {"w": torch.tensor([[1.0, 2, 3, 4, 50], [5, 6, 7, 8, 9]])}
    masks = fastsal.rank(scores, 0.5, pattern="1x4")
    assert masks["w"].tolist() == [[False] * 4 + [True], [True] * 4 + [False]]
    assert masks.recipe["pattern"] == "1x4"


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 3, 3), (9,)])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_reducing_and_expanding_are_inverse(shape, m):
    values = torch.rand(shape)
    groups = reduce_groups(values, m, "first")
    assert torch.equal(reduce_groups(expand_groups(groups, shape, m), m, "first"), groups)
    assert group_scores({"w": values}, m)["w"].sum() == pytest.approx(float(values.sum()), rel=1e-5)


@pytest.mark.parametrize("text", ["2:4", " 4:8 ", "1x4", "1×8"])
def test_patterns_that_are_read(text):
    assert str(Pattern.parse(text)) == text.strip().replace("×", "x")


@pytest.mark.parametrize("text", ["", "4:2", "0:4", "2-4", "x4", "2x4", "1x0"])
def test_patterns_that_are_not(text):
    with pytest.raises(InvalidArgument, match="pattern"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("pattern", "given", "match"),
    [
        ("8:16", {}, "at most 8 for joint costs"),
        ("2:4", {"sparsity": 0.7}, "None or 0.5 with pattern '2:4', got 0.7"),
        ("2:4", {"floor": 0.6}, "at most 0.5 with pattern '2:4', got 0.6"),
        ("1x4", {}, "sparsity"),
        ("2:4", {"damping": 0.0}, "damping"),
    ],
)
def test_bad_arguments(collected, pattern, given, match):
    with pytest.raises(InvalidArgument, match=match):
        fastsal.rank_pattern(*collected, pattern, **given)


def test_blocks_that_cannot_be_factored_are_named(collected):
    model, fisher = collected
    sums_of(fisher).parameters["fc.weight"].packed[0] = -1e6
    with pytest.raises(FactorizationError, match=r"'fc.weight' \(0\)"):
        fastsal.rank_pattern(model, fisher, "2:4", damping=1e-3)


def test_prune_takes_the_joint_choice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))
    data = torch.randn(120, 3, 4, 4), torch.randint(0, 5, (120,))
    fisher = fastsal.collect(model, [data])
    expected = fastsal.rank_pattern(model, fisher, "2:4", damping=1e-3)
    result = fastsal.prune(model, [data], pattern="2:4", damping=1e-3)
    assert all(torch.equal(result.masks[name], expected[name]) for name in expected)
    assert result.masks.recipe["joint"] is True
    result.masks.verify(model)


def test_joint_choice_predicts_less_loss_than_single_scores(collected):
    model, fisher = collected
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def predicted(masks):
        report = fastsal.compensate(model, fisher, masks, 1e-2)
        model.load_state_dict(start)
        return report.total

    scores = fastsal.score(model, fisher, "block-fisher", 1e-2)
    single = predicted(fastsal.rank(scores, pattern="2:4"))
    assert predicted(fastsal.rank_pattern(model, fisher, "2:4", damping=1e-2)) < single


def test_whole_groups_need_a_sparsity():
    scores = {"w": torch.rand(4, 8)}
    for call in (
        lambda: fastsal.rank(scores, pattern="1x4"),
        lambda: fastsal.prune(
            nn.Linear(8, 4), None, criterion="magnitude", compensate=False, pattern="1x4"
        ),
    ):
        with pytest.raises(InvalidArgument, match="sparsity must be .* pattern '1x4', .* None"):
            call()
