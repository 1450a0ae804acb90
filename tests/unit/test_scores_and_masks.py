"""Criteria are their formulas, counts are exact, masks are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastsal
from fastsal.errors import FileFormatError, InvalidArgument, MaskError, UnknownParameter


def make() -> tuple[nn.Module, fastsal.BlockFisher, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    rows = {n: torch.randn(50, *p.shape) for n, p in model.named_parameters() if "weight" in n}
    fisher = fastsal.BlockFisher(
        {n: g.shape[1:] for n, g in rows.items()}, block_size=8, precision="float64"
    )
    fisher.update(rows)
    return model, fisher, rows


def test_formulas():
    model, fisher, rows = make()
    for name, g in rows.items():
        w = dict(model.named_parameters())[name].detach().double()
        g = g.double()
        expected = {
            "magnitude": w.square() / 2,
            "taylor": (w * g.mean(0)).abs(),
            "diag-fisher": w.square() * g.square().mean(0) / 2,
        }
        for criterion, scores in expected.items():
            got = fastsal.score(model, fisher, criterion)[name]
            assert got.dtype == torch.float32
            assert torch.allclose(got.double(), scores, rtol=1e-6, atol=1e-12)
        a = fisher.blocks(name) + 0.1 * torch.eye(8, dtype=torch.float64)
        diagonal = torch.linalg.inv(a).diagonal(dim1=1, dim2=2).flatten()[: w.numel()]
        got = fastsal.score(model, fisher, "block-fisher", 0.1)[name]
        assert torch.allclose(got.double(), w.square() / (2 * diagonal.reshape(w.shape)), rtol=1e-6)


def test_limits_of_damping_and_block_size():
    model, fisher, rows = make()
    large = fastsal.score(model, fisher, "block-fisher", 1e9)
    magnitude = fastsal.score(model, None, "magnitude")
    assert fastsal.rank(large, 0.5) == fastsal.rank(magnitude, 0.5)
    one = fastsal.BlockFisher(fisher.shapes, block_size=1, precision="float64")
    one.update(rows)
    tiny = fastsal.score(model, one, "block-fisher", 1e-12)
    diagonal = fastsal.score(model, fisher, "diag-fisher")
    for share in (0.2, 0.5, 0.8):
        assert fastsal.rank(tiny, share) == fastsal.rank(diagonal, share)


def test_random_is_seeded():
    model, *_ = make()
    one, again, other = (fastsal.score(model, None, "random", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_pruned_weights_score_lowest():
    model, fisher, _ = make()
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), 0.3)
    for criterion in fastsal.CRITERIA:
        scores = fastsal.score(model, fisher, criterion, 0.1, masks=masks)
        assert all(bool((scores[n] == -np.inf).eq(~masks[n]).all()) for n in masks)


def test_bad_scores():
    model, fisher, _ = make()
    for damping in (0, -1.0, float("nan"), float("inf"), "x", True, None):
        with pytest.raises(InvalidArgument, match="damping"):
            fastsal.score(model, fisher, "block-fisher", damping)
    with pytest.raises(InvalidArgument, match="did you mean 'block-fisher'"):
        fastsal.score(model, fisher, "block-fischer")
    with pytest.raises(InvalidArgument, match="fisher"):
        fastsal.score(model, None, "taylor")
    with pytest.raises(UnknownParameter, match=r"0\.weight"):
        fastsal.score(nn.Linear(2, 2), fisher)
    with pytest.raises(UnknownParameter, match="shape"):
        fastsal.score(nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 4)), fisher)
    with pytest.raises(UnknownParameter, match="nothing|matches"):
        fastsal.score(model, None, "magnitude", parameters="conv*")


def slow_mask(scores: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Sort everything, the first of equals first."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[torch.sort(flat, stable=True).indices[:count]] = False
    parts = kept.split([s.numel() for s in scores.values()])
    return {n: k.reshape(s.shape) for (n, s), k in zip(scores.items(), parts, strict=True)}


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sparsity=st.floats(0, 1),
    levels=st.sampled_from([1, 3, 1000]),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
)
def test_global_ranking_equals_sorting(seed, sparsity, levels, sizes):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"p{i}": torch.randint(-levels, levels + 1, (n,), generator=generator).float()
        for i, n in enumerate(sizes)
    }
    count = round(sparsity * sum(sizes))
    masks = fastsal.rank(scores, sparsity)
    assert masks.total - sum(masks.kept.values()) == count
    expected = slow_mask(scores, count)
    assert all(torch.equal(masks[n], expected[n]) for n in scores)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0, 0.9), floor=st.floats(0, 0.1))
def test_scopes_and_floors_are_exact(seed, sparsity, floor):
    torch.manual_seed(seed)
    scores = {"a": torch.rand(20, 30), "b": torch.rand(8, 5, 3, 3), "c": torch.rand(10, 4) / 50}
    sizes = {n: s.numel() for n, s in scores.items()}
    total = sum(sizes.values())
    for scope in ("global", "erk"):
        masks = fastsal.rank(scores, sparsity, scope, floor=floor)
        assert total - sum(masks.kept.values()) == round(sparsity * total)
        assert all(masks.kept[n] >= floor * sizes[n] for n in sizes)
    layer = fastsal.rank(scores, sparsity, "layer", floor=floor)
    assert all(sizes[n] - layer.kept[n] == round(sparsity * sizes[n]) for n in sizes)


def test_erk_densities():
    scores = {"a": torch.rand(100, 100), "b": torch.rand(50, 60, 3, 3)}
    masks = fastsal.rank(scores, 0.9, "erk")
    density = {n: masks.kept[n] / s.numel() / (sum(s.shape) / s.numel()) for n, s in scores.items()}
    assert density["a"] == pytest.approx(density["b"], rel=1e-2)


def test_sparsity_zero_and_one():
    scores = {"a": torch.rand(7), "b": torch.rand(3, 3)}
    assert fastsal.rank(scores, 0.0).sparsity == 0
    assert fastsal.rank(scores, 1.0).sparsity == 1
    assert fastsal.rank(scores, 1, "layer").sparsity == 1
    assert fastsal.rank(scores, 0, "erk").sparsity == 0


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:1"])
def test_patterns(pattern):
    n, m = map(int, pattern.split(":"))
    scores = {"fc": torch.rand(5, 18), "conv": torch.rand(3, 8, 2, 2)}
    masks = fastsal.rank(scores, pattern=pattern)
    for name, s in scores.items():
        moved = s.movedim(1, -1).reshape(-1, s.shape[1])
        kept = masks[name].movedim(1, -1).reshape(-1, s.shape[1])
        for row, own in zip(moved, kept, strict=True):
            for start in range(0, len(row), m):
                group, chosen = row[start : start + m], own[start : start + m]
                count = -(-len(group) * n // m)
                assert int(chosen.sum()) == count
                assert set(group.topk(count).indices.tolist()) == set(
                    chosen.nonzero().flatten().tolist()
                )


def test_bad_ranking():
    scores = {"a": torch.rand(10)}
    for sparsity in (-0.1, 1.1, float("nan"), "x", None, True):
        with pytest.raises(InvalidArgument, match="sparsity"):
            fastsal.rank(scores, sparsity)
    cases = [
        ({"floor": 2.0}, "floor"),
        ({"floor": 0.5}, "sparsity"),
        ({"scope": "all"}, "scope"),
        ({"pattern": "4:2"}, "pattern"),
        ({"pattern": "two"}, "pattern"),
        ({"pattern": "2:4"}, "sparsity"),
    ]
    for options, argument in cases:
        with pytest.raises(InvalidArgument, match=argument):
            fastsal.rank(scores, 0.9, **options)
    with pytest.raises(InvalidArgument, match="NaN at position 1"):
        fastsal.rank({"a": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(InvalidArgument, match="scores"):
        fastsal.rank({}, 0.5)


def test_masks_apply_and_verify():
    model, *_ = make()
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), 0.5)
    with pytest.raises(MaskError, match="not zero"):
        masks.verify(model)
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = float("inf")
    bias = model[0].bias.clone()
    masks.apply(model)
    masks.verify(model)
    assert bool((model[0].weight[~masks["0.weight"]] == 0).all())
    assert torch.equal(model[0].bias, bias)
    for other in (nn.Linear(2, 2), nn.Sequential(nn.Linear(6, 8), nn.Linear(9, 4))):
        before = [p.clone() for p in other.parameters()]
        for call in (masks.apply, masks.verify):
            with pytest.raises(MaskError, match="another model"):
                call(other)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_mask_files(tmp_path):
    model, *_ = make()
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), 0.4)
    path = tmp_path / "masks.safetensors"
    masks.save(path, {"note": "by hand"})
    loaded = fastsal.Masks.load(path)
    assert loaded == masks
    assert loaded.recipe["note"] == "by hand"
    assert loaded.recipe["sparsity"] == 0.4
    whole = path.read_bytes()
    for cut in (0, 4, 60, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError):
            fastsal.Masks.load(path)
    changed = bytearray(whole)
    changed[-1] ^= 1  # a bit of a mask
    header = whole.replace(b"by hand", b"by band")  # the recipe
    for content in (bytes(changed), header):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="changed"):
            fastsal.Masks.load(path)
    with pytest.raises(FileNotFoundError):
        fastsal.Masks.load(tmp_path / "none")
