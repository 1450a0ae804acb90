"""Every criterion = its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal import BlockFisher, Masks
from fastsal.errors import InvalidArgument, MaskError, UnknownParameter
from fastsal.fisher.block_fisher import sums_of
from fastsal.pruning.criteria import CRITERIA

SHAPES = {"conv": (4, 3, 3, 3), "fc": (5, 7)}
NAMES = ["block-fisher", "diag-fisher", "magnitude", "obs-greedy", "random", "taylor"]
BAD_DAMPINGS = [0, 0.0, -1e-5, math.nan, math.inf, -math.inf, "auto", "1e-5", True, None,
                "0x", "-1x", "nanx", "infx", "x", "0.1", "0.1xx", np.bool_(True)]  # fmt: skip


class Holder(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(
                name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            )


def gradients(n=90):
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(n, *shape, generator=generator) + 0.2)
        * torch.logspace(-1, 1, math.prod(shape)).reshape(shape)
        for name, shape in SHAPES.items()
    }


def statistics(block_size=8, n=90, precision="float64"):
    fisher = BlockFisher(SHAPES, block_size=block_size, precision=precision)
    fisher.update(gradients(n))
    return fisher


def weights(model):
    return {name: p.detach().double() for name, p in model.named_parameters()}


def inverse_diagonal(g, damping, size):
    flat = g.double().reshape(g.shape[0], -1)
    parts = []
    for start in range(0, flat.shape[1], size):
        part = flat[:, start : start + size]
        a = part.T @ part / len(part) + damping * torch.eye(part.shape[1], dtype=torch.float64)
        parts.append(torch.linalg.inv(a).diagonal())
    return torch.cat(parts).reshape(g.shape[1:])


FORMULAS = {
    "magnitude": lambda w, g, damping: w**2 / 2,
    "taylor": lambda w, g, damping: (w * g.double().mean(0)).abs(),
    "diag-fisher": lambda w, g, damping: w**2 * g.double().square().mean(0) / 2,
    "block-fisher": lambda w, g, damping: w**2 / (2 * inverse_diagonal(g, damping, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("damping", [1e-3, 1])
@pytest.mark.parametrize("criterion", FORMULAS)
def test_equals_the_formula(criterion, damping, dtype):
    model = Holder(dtype)
    got = fastsal.score(model, statistics(), criterion, damping)
    assert list(got) == list(SHAPES)
    for name, g in gradients().items():
        want = FORMULAS[criterion](weights(model)[name], g, damping)
        assert got[name].dtype == torch.float32
        assert got[name].shape == SHAPES[name]
        assert got[name].is_contiguous()
        assert not got[name].requires_grad
        torch.testing.assert_close(got[name].double(), want, rtol=1e-6, atol=1e-30)


def test_defaults():
    model, fisher = Holder(), statistics()
    default = fastsal.score(model, fisher)
    explicit = fastsal.score(model, fisher, criterion="block-fisher", damping="0.1x")
    assert all(torch.equal(default[name], explicit[name]) for name in SHAPES)


def test_these_are_the_criteria():
    assert sorted(CRITERIA) == NAMES


@pytest.mark.parametrize("criterion", ["block-fisher", "obs-greedy"])
def test_great_damping_ranks_as_magnitude(criterion):
    model = Holder()
    got = fastsal.score(model, statistics(), criterion, 1e9)
    want = fastsal.score(model, statistics(), "magnitude")
    for name in SHAPES:
        torch.testing.assert_close(got[name] / 1e9, want[name], rtol=1e-5, atol=0)
        assert torch.equal(got[name].reshape(-1).argsort(), want[name].reshape(-1).argsort())


def test_small_damping_does_not_rank_as_magnitude():
    model = Holder()
    got = fastsal.score(model, statistics(), "block-fisher", 1e-3)["fc"]
    want = fastsal.score(model, statistics(), "magnitude")["fc"]
    assert not torch.equal(got.reshape(-1).argsort(), want.reshape(-1).argsort())


@pytest.mark.parametrize("criterion", ["block-fisher", "obs-greedy"])
@pytest.mark.parametrize("damping", [1e-4, 0.3])
def test_blocks_of_one_are_the_damped_diagonal(criterion, damping):
    model = Holder()
    got = fastsal.score(model, statistics(block_size=1), criterion, damping)
    for name, g in gradients().items():
        f = g.double().square().mean(0)
        want = weights(model)[name] ** 2 * (f + damping) / 2
        torch.testing.assert_close(got[name].double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [3, 90])
@pytest.mark.parametrize("criterion", NAMES)
def test_dual_statistics_give_the_same(criterion, n):
    model = Holder()
    dual, primal = (statistics(None, n, precision="float64") for _ in range(2))
    for p in sums_of(primal).parameters.values():
        p.fold()
    a, b = (fastsal.score(model, fisher, criterion, 0.1) for fisher in (dual, primal))
    for name in SHAPES:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=0)


def test_random_is_seeded():
    model = Holder()
    a, b, c = (
        fastsal.score(model, None, "random", seed=seed, parameters=list(SHAPES))
        for seed in (3, 3, 4)
    )
    state = torch.get_rng_state()
    d = fastsal.score(model, statistics(), "random", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for name in SHAPES:
        assert torch.equal(a[name], b[name])
        assert torch.equal(a[name], d[name])
        assert not torch.equal(a[name], c[name])
        assert ((a[name] >= 0) & (a[name] < 1)).all()
    assert not torch.equal(a["conv"].reshape(-1)[:35], a["fc"].reshape(-1))


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_without_statistics(criterion):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    assert list(fastsal.score(model, None, criterion)) == ["0.weight", "2.weight"]
    assert list(fastsal.score(model, None, criterion, parameters="2.*")) == ["2.weight"]
    assert list(fastsal.score(model, None, criterion, parameters=["1.weight", "2.bias"])) == [
        "1.weight",
        "2.bias",
    ]


@pytest.mark.parametrize("criterion", ["taylor", "diag-fisher", "block-fisher", "obs-greedy"])
def test_statistics_missing(criterion):
    with pytest.raises(
        InvalidArgument,
        match=f"^fisher must be statistics .* for '{criterion}', got None",
    ):
        fastsal.score(Holder(), None, criterion)
    with pytest.raises(InvalidArgument, match="^fisher has no samples"):
        fastsal.score(Holder(), BlockFisher(SHAPES), criterion)


def test_parameters_come_from_statistics():
    with pytest.raises(InvalidArgument, match="^parameters must be None with fisher"):
        fastsal.score(Holder(), statistics(), "magnitude", parameters="fc")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("block-fischer", "block-fisher"),
        ("obs_greedy", "obs-greedy"),
        ("Magnitude", "magnitude"),
        ("diagfisher", "diag-fisher"),
        ("zzz", None),
        ("", None),
        (None, None),
    ],
)
def test_unknown_criterion(given, meant):
    with pytest.raises(InvalidArgument, match="^criterion must be .*, got") as caught:
        fastsal.score(Holder(), statistics(), given)
    message = str(caught.value)
    assert all(repr(name) in message for name in NAMES)
    assert (f"did you mean {meant!r}?" in message) == (meant is not None)
    assert ("did you mean" in message) == (meant is not None)


@pytest.mark.parametrize("damping", BAD_DAMPINGS)
@pytest.mark.parametrize("criterion", ["block-fisher", "obs-greedy"])
def test_dampings_that_are_not_taken(criterion, damping):
    with pytest.raises(
        InvalidArgument,
        match="^damping must be a positive number or a multiple such as '0.1x', got",
    ):
        fastsal.score(Holder(), statistics(), criterion, damping)


@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor", "diag-fisher"])
def test_damping_that_is_not_used_is_not_looked_at(criterion):
    a = fastsal.score(Holder(), statistics(), criterion, math.nan)
    b = fastsal.score(Holder(), statistics(), criterion)
    assert all(torch.equal(a[name], b[name]) for name in SHAPES)


@pytest.mark.parametrize("criterion", NAMES)
def test_statistics_of_another_model(criterion):
    fisher = statistics()
    model = Holder()
    model.fc = nn.Parameter(torch.zeros(7, 5))
    with pytest.raises(
        UnknownParameter, match=r"model: parameter 'fc' must have shape \(5, 7\), got \(7, 5\)"
    ):
        fastsal.score(model, fisher, criterion)
    del model.fc
    with pytest.raises(UnknownParameter, match="model: has no parameter 'fc'"):
        fastsal.score(model, fisher, criterion)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("criterion", NAMES)
def test_weights_that_are_not_finite(criterion, value):
    model = Holder()
    with torch.no_grad():
        model.fc[2, 3] = value
    with pytest.raises(InvalidArgument, match="model: parameter 'fc' has NaN or infinite weights"):
        fastsal.score(model, statistics(), criterion)


@pytest.mark.parametrize("n", [3, 90])
@pytest.mark.parametrize("criterion", NAMES)
def test_pruned_weights_score_minus_infinity(criterion, n):
    model, fisher = Holder(), statistics(None, n)
    generator = torch.Generator().manual_seed(2)
    masks = Masks({"fc": torch.rand(SHAPES["fc"], generator=generator) < 0.6})
    masks.apply(model)
    scores = fastsal.score(model, fisher, criterion, 0.1, masks=masks)
    assert torch.equal(scores["fc"] == -math.inf, ~masks["fc"])
    assert torch.isfinite(scores["conv"]).all()
    assert (scores["fc"][masks["fc"]] >= 0).all()
    # So they are the first to go again.
    again = fastsal.rank({"fc": scores["fc"]}, masks.sparsity)
    assert torch.equal(again["fc"], masks["fc"])


def test_pruned_weights_take_no_part_in_the_inverse():
    model, fisher = Holder(), statistics(block_size=None)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    scores = fastsal.score(model, fisher, "block-fisher", 0.1, masks=Masks({"fc": mask}))["fc"]
    g = gradients()["fc"].double()[:, mask]
    a = g.T @ g / len(g) + 0.1 * torch.eye(g.shape[1], dtype=torch.float64)
    want = weights(model)["fc"][mask] ** 2 / (2 * torch.linalg.inv(a).diagonal())
    torch.testing.assert_close(scores[mask].double(), want, rtol=1e-6, atol=0)
    whole = fastsal.score(model, fisher, "block-fisher", 0.1)["fc"]
    assert not torch.allclose(scores[mask], whole[mask], rtol=1e-3)


@pytest.mark.parametrize("criterion", NAMES)
def test_masks_of_another_shape(criterion):
    masks = Masks({"fc": torch.ones(35)})
    with pytest.raises(MaskError, match=r"masks: 'fc' must have shape \(5, 7\), got \(35,\)"):
        fastsal.score(Holder(), statistics(), criterion, masks=masks)


@pytest.mark.parametrize("criterion", NAMES)
def test_nothing_is_changed(criterion):
    model, fisher = Holder(), statistics(None, 3)
    before = weights(model)
    blocks = fisher.blocks("fc")
    fastsal.score(model, fisher, criterion)
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())
    assert torch.equal(fisher.blocks("fc"), blocks)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_channels_last_weights():
    model, fisher = Holder(), statistics()
    want = {c: fastsal.score(model, fisher, c, 0.1)["conv"] for c in NAMES}
    model.conv.data = model.conv.data.to(memory_format=torch.channels_last)
    for criterion in NAMES:
        assert torch.equal(fastsal.score(model, fisher, criterion, 0.1)["conv"], want[criterion])
