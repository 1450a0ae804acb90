"""Statistics and pruning of a small model: equal to a loop, exact, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsal
from fastsal.errors import (
    DataError,
    FastsalError,
    InvalidArgument,
    NonFiniteGradient,
    UnknownParameter,
    UnsupportedLayer,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(F.relu(self.bn(self.conv(x))).mean((2, 3))))


class Unused(Small):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 3)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().double()


def images(n: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % 3


def state(model: nn.Module) -> list[object]:
    found: list[object] = [torch.get_rng_state()]
    found += [m.training for m in model.modules()]
    for p in model.parameters():
        found += [p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone()]
    found += [b.clone() for b in model.buffers()]
    found += [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return found


def same(a: list[object], b: list[object]) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 64])
@pytest.mark.parametrize("batch", [1, 7, 20])
def test_equals_a_loop_over_samples(model, micro_batch, batch):
    x, y = images()
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    fisher = fastsal.collect(
        model, batches, block_size=5, precision="float64", micro_batch=micro_batch
    )
    rows: dict[str, list[Tensor]] = {"conv.weight": [], "fc.weight": []}
    frozen = copy.deepcopy(model).eval()
    for i in range(len(y)):
        frozen.zero_grad()
        F.cross_entropy(frozen(x[i : i + 1]), y[i : i + 1]).backward()
        for name, found in rows.items():
            found.append(frozen.get_parameter(name).grad.flatten().clone())
    direct = fastsal.BlockFisher(fisher.shapes, block_size=5, precision="float64")
    direct.update({n: torch.stack(g).reshape(-1, *fisher.shapes[n]) for n, g in rows.items()})
    assert fisher.samples == 20
    for name in rows:
        a, b = fisher.blocks(name), direct.blocks(name)
        assert float((a - b).abs().max() / b.abs().max()) < 1e-12


def test_model_is_left_as_found(model):
    model.train()
    model.bn.eval()
    model.fc.bias.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before = state(model)
    with torch.no_grad():
        fastsal.collect(model, [images()])
    assert same(before, state(model))
    x, y = images()
    x[3] = float("nan")
    for batches in ([(x, y)], [], [images(), (x, y + 9)]):
        with pytest.raises(FastsalError):
            fastsal.collect(model, batches)
        with pytest.raises(FastsalError):
            fastsal.prune(model, batches, 0.5)
    assert same(before, state(model))


def test_samples_and_bad_batches(model):
    x, y = images()
    assert fastsal.collect(model, [(x, y)] * 3, samples=31).samples == 31
    few = fastsal.collect(model, [(x, y)], samples=7, precision="float64")
    direct = fastsal.collect(model, [(x[:7], y[:7])], precision="float64")
    assert torch.equal(few.blocks("fc.weight"), direct.blocks("fc.weight"))
    cases = [
        (dict(batches=[(x, y)], samples=21), "samples: asked for 21"),
        (dict(batches=[(x, y)], samples=0), "samples"),
        (dict(batches=[]), "batches: is empty"),
        (dict(batches=[(x[:0], y[:0])]), "batch 0 has no images"),
        (dict(batches=[x]), "batch 0"),
        (dict(batches=[(x, y + 1)]), "labels"),
        (dict(batches=[(x, y - 1)]), "labels"),
        (dict(batches=[(x, y.float())]), "labels"),
        (dict(batches=[(x, y[:5])]), "labels"),
        (dict(batches=[(x.byte(), y)]), "images"),
    ]
    for options, message in cases:
        with pytest.raises((DataError, InvalidArgument), match=message):
            fastsal.collect(model, **options)


def test_bad_sample_is_named(model):
    x, y = images()
    bad = x.clone()
    bad[5, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteGradient, match="sample 25"):
        fastsal.collect(model, [(x, y), (bad, y)], micro_batch=2)


def test_parameters(model):
    only = fastsal.collect(model, [images()], parameters="fc.*")
    assert only.names == ["fc.weight"]
    with pytest.raises(UnknownParameter, match="nothing.weight"):
        fastsal.collect(model, [images()], parameters=["nothing.weight"])
    unused = Unused().double()
    with pytest.raises(UnsupportedLayer, match=r"spare\.weight"):
        fastsal.collect(unused, [images()])
    assert "spare.weight" not in fastsal.collect(unused, [images()], parameters="!spare*").names


def test_sampled_labels(model):
    x, _ = images()
    one, again, other = (
        fastsal.collect(model, [(x, None)], labels="sampled", seed=s) for s in (0, 0, 1)
    )
    assert torch.equal(one.blocks("fc.weight"), again.blocks("fc.weight"))
    assert not torch.equal(one.blocks("fc.weight"), other.blocks("fc.weight"))


def test_low_precision_passes(model):
    single = model.float()
    x, y = images()
    full = fastsal.collect(single, [(x.float(), y)])
    half = fastsal.collect(single, [(x.float(), y)], autocast=torch.bfloat16)
    a, b = full.blocks("fc.weight"), half.blocks("fc.weight")
    assert float((a - b).abs().max() / a.abs().max()) < 0.05


@pytest.mark.parametrize("criterion", list(fastsal.CRITERIA))
@pytest.mark.parametrize("compensate", [True, False])
def test_prune_is_exact(model, criterion, compensate):
    biases = model.fc.bias.detach().clone()
    result = fastsal.prune(model, [images(64)], 0.5, criterion=criterion, compensate=compensate)
    result.masks.verify(model)
    total = result.masks.total
    assert total - sum(result.masks.kept.values()) == round(0.5 * total)
    assert torch.equal(model.fc.bias, biases)
    assert result.history[0]["sparsity"] == result.masks.sparsity


def test_rounds_only_take_away(model):
    seen = []
    for rounds in (1, 3):
        copied = copy.deepcopy(model)
        result = fastsal.prune(copied, [images(64)], 0.7, rounds=rounds)
        assert result.masks.total - sum(result.masks.kept.values()) == round(0.7 * 84)
        seen.append([h["sparsity"] for h in result.history])
    expected = [1 - 0.3 ** (r / 3) for r in (1, 2, 3)]
    assert seen[1] == pytest.approx(expected, abs=0.5 / 84)


def test_automatic_damping_takes_the_least_loss(model):
    result = fastsal.prune(model, [images(64)], 0.5)
    evidence = result.history[0]["damping_evidence"]
    assert min(evidence, key=lambda pair: pair[1])[0] == result.history[0]["damping"]
    assert len({damping for damping, _ in evidence}) > 3


def test_bad_pruning_changes_nothing(model):
    before = state(model)
    good = [images(64)]
    cases = [
        ((good, 1.5), {}, "sparsity"),
        ((good, float("nan")), {}, "sparsity"),
        ((good, -0.1), {}, "sparsity"),
        ((good,), {}, "sparsity"),
        ((good, 0.5), {"criterion": "none"}, "criterion"),
        ((good, 0.5), {"damping": 0}, "damping"),
        ((good, 0.5), {"damping": "large"}, "damping"),
        ((good, 0.5), {"rounds": 0}, "rounds"),
        ((iter(good), 0.5), {"rounds": 2}, "batches"),
        ((None, 0.5), {}, "batches"),
        ((good, 0.9), {"floor": 0.5}, "sparsity"),
        ((good, 0.5), {"pattern": "2:4", "rounds": 2}, "rounds"),
        ((good, 0.5), {"samples": 65}, "samples"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(FastsalError, match=message):
            fastsal.prune(model, *arguments, **options)
    assert same(before, state(model))


def test_sparsity_zero_and_one(model):
    before = [p.detach().clone() for p in model.parameters()]
    fastsal.prune(model, [images(64)], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    result = fastsal.prune(model, [images(64)], 1.0)
    assert result.masks.sparsity == 1
    assert not model.fc.weight.any()


def test_without_images(model):
    result = fastsal.prune(model, None, 0.5, criterion="magnitude", compensate=False)
    result.masks.verify(model)
