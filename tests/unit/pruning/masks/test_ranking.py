"""From scores to masks = a stable sort."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsal
from fastsal import rank
from fastsal.errors import InvalidArgument


def slow(scores, count, floors=None):
    """Walk the weights in the order of a stable sort; a parameter at its floor is passed over."""
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    owner = [name for name, s in scores.items() for _ in range(s.numel())]
    left = {name: s.numel() - (floors or {}).get(name, 0) for name, s in scores.items()}
    kept = torch.ones(len(flat), dtype=torch.bool)
    for j in torch.argsort(flat + 0.0, stable=True).tolist():
        if count and left[owner[j]]:
            kept[j] = False
            left[owner[j]] -= 1
            count -= 1
    parts = kept.split([s.numel() for s in scores.values()])
    return {n: m.reshape(s.shape) for (n, s), m in zip(scores.items(), parts, strict=True)}


def assert_masks(got, want):
    assert list(got) == list(want)
    for name in want:
        assert torch.equal(got[name], want[name]), name


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38]


@st.composite
def many_scores(draw, ties=True):
    shapes = draw(
        st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=8)
    )
    kind = draw(
        st.sampled_from(["distinct", "few values", "special", "equal"] if ties else ["distinct"])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = {}
    for i, shape in enumerate(shapes):
        if kind == "distinct":
            values = torch.randn(shape, generator=generator)
        elif kind == "few values":
            values = torch.randint(-2, 3, shape, generator=generator).float()
        elif kind == "special":
            values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
        else:
            values = torch.zeros(shape)
        scores[f"p{i}"] = values
    return scores


def total(scores):
    return sum(s.numel() for s in scores.values())


def pruned(masks):
    return sum(int((~m).sum()) for m in masks.values())


@settings(max_examples=200, deadline=None)
@given(many_scores(), st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 0.0, 0.5, 1.0])))
def test_global_equals_a_stable_sort(scores, sparsity):
    masks = rank(scores, sparsity)
    count = round(sparsity * total(scores))
    assert pruned(masks) == count
    assert masks.sparsity == pytest.approx(count / total(scores), abs=1e-12)
    assert_masks(masks, slow(scores, count))


@settings(max_examples=100, deadline=None)
@given(many_scores(), st.floats(0, 1))
def test_layer_equals_a_stable_sort_of_each(scores, sparsity):
    masks = rank(scores, sparsity, scope="layer")
    for name, values in scores.items():
        alone = {name: values}
        assert torch.equal(masks[name], slow(alone, round(sparsity * values.numel()))[name])


@settings(max_examples=200, deadline=None)
@given(many_scores(), st.floats(0, 1), st.floats(0, 1))
def test_floor_equals_the_slow_walk(scores, sparsity, floor):
    floors = {n: math.ceil(floor * s.numel() * (1 - 1e-12)) for n, s in scores.items()}
    count = round(sparsity * total(scores))
    if count > total(scores) - sum(floors.values()):
        with pytest.raises(InvalidArgument, match="^sparsity .*floor="):
            rank(scores, sparsity, floor=floor)
        return
    masks = rank(scores, sparsity, floor=floor)
    assert pruned(masks) == count
    assert all(masks.kept[n] >= floors[n] for n in scores)
    assert_masks(masks, slow(scores, count, floors))


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_none_and_all(scope):
    scores = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(2, 3, 2, 2)}
    for none in (0, 0.0):
        assert rank(scores, none, scope=scope).sparsity == 0
    for all_ in (1, 1.0):
        masks = rank(scores, all_, scope=scope)
        assert masks.sparsity == 1
        assert not any(m.any() for m in masks.values())


def test_counts_are_exact_for_every_count():
    scores = {"a": torch.randint(0, 3, (7, 5)).float(), "b": torch.rand(22)}
    for count in range(58):
        for scope in ("global", "erk"):
            assert pruned(rank(scores, count / 57, scope=scope)) == count


def test_large_arrays_and_ties_across_them():
    """Past the size at which the core splits an array."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.randint(0, 4, (700, 1000), generator=generator).float(),
        "b": torch.rand(300_001, generator=generator),
        "c": torch.zeros(400_000),
    }
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    for sparsity in (0.1, 0.35, 0.62, 0.999):
        count = round(sparsity * len(flat))
        want = torch.ones(len(flat), dtype=torch.bool)
        want[torch.argsort(flat, stable=True)[:count]] = False
        got = torch.cat([m.reshape(-1) for m in rank(scores, sparsity).values()])
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_layouts(dtype):
    scores = {"a": torch.randn(4, 6).t().to(dtype), "b": torch.randn(3, 4, 2, 2).to(dtype)}
    scores["b"] = scores["b"].to(memory_format=torch.channels_last).requires_grad_()
    single = {name: s.detach().float().contiguous() for name, s in scores.items()}
    for scope in ("global", "layer", "erk"):
        assert_masks(rank(scores, 0.4, scope=scope), dict(rank(single, 0.4, scope=scope)))
    assert_masks(rank(scores, pattern="1:2"), dict(rank(single, pattern="1:2")))


def test_arrays_of_numpy():
    scores = {"a": np.random.default_rng(0).random((6, 8)).astype(np.float32)}
    tensors = {"a": torch.from_numpy(scores["a"])}
    for arguments in ({"sparsity": 0.3}, {"sparsity": 0.3, "scope": "erk"}, {"pattern": "2:4"}):
        assert_masks(rank(scores, **arguments), dict(rank(tensors, **arguments)))


def test_scores_are_left_alone():
    scores = {"a": torch.randn(5, 8)}
    before = scores["a"].clone()
    rank(scores, 0.5)
    rank(scores, pattern="2:4")
    assert torch.equal(scores["a"], before)


# Erdős-Rényi kernel.


@settings(max_examples=200, deadline=None)
@given(many_scores(ties=False), st.floats(0, 1), st.sampled_from([0.0, 0.0, 0.1, 0.5]))
def test_erk(scores, sparsity, floor):
    count = round(sparsity * total(scores))
    floors = {n: math.ceil(floor * s.numel()) for n, s in scores.items()}
    if count > total(scores) - sum(floors.values()):
        with pytest.raises(InvalidArgument, match="prunes .* weights, but the floor allows only"):
            rank(scores, sparsity, scope="erk", floor=floor)
        return
    masks = rank(scores, sparsity, scope="erk", floor=floor)
    assert pruned(masks) == count
    kept = masks.kept
    # Where neither end clips, densities are as sum / product of dimensions, to the last weight.
    free = [n for n, s in scores.items() if max(floors[n], 1) < kept[n] < s.numel()]
    for a, b in itertools.combinations(free, 2):
        wa, wb = sum(scores[a].shape), sum(scores[b].shape)
        assert kept[a] - 1 <= (kept[b] + 1) * wa / wb
        assert kept[b] - 1 <= (kept[a] + 1) * wb / wa
    for name, values in scores.items():
        assert kept[name] >= floors[name]
        alone = slow({name: values}, values.numel() - kept[name])
        assert torch.equal(masks[name], alone[name])


def test_erk_densities_of_a_network():
    shapes = {"stem": (16, 3, 3, 3), "wide": (64, 64, 3, 3), "fc": (10, 64)}
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    masks = rank(scores, 0.9, scope="erk")
    keep = total(scores) - round(0.9 * total(scores))
    assert sum(masks.kept.values()) == keep
    # What would be denser than dense stays dense, and the others share the rest.
    dense = set()
    for _ in shapes:
        left = keep - sum(math.prod(shapes[n]) for n in dense)
        epsilon = left / sum(sum(s) for n, s in shapes.items() if n not in dense)
        dense |= {n for n, s in shapes.items() if epsilon * sum(s) > math.prod(s)}
    assert dense == {"stem", "fc"}
    for name, shape in shapes.items():
        want = math.prod(shape) if name in dense else epsilon * sum(shape)
        assert abs(masks.kept[name] - want) <= 1


@settings(max_examples=100, deadline=None)
@given(many_scores(ties=False), st.lists(st.floats(0, 1), min_size=2, max_size=6))
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_rising_sparsity_never_gives_weights_back(scope, scores, sparsities):
    before = None
    for sparsity in sorted(sparsities):
        masks = rank(scores, sparsity, scope=scope)
        if before is not None:
            assert not any((masks[n] & ~before[n]).any() for n in scores)
        before = masks


# Patterns.


def slow_pattern(scores, n, m):
    """The n best of every m along axis 1; of a short group of r, ceil(r n / m)."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    rows = scores if scores.dim() > 1 else scores[None]
    out = kept if scores.dim() > 1 else kept[None]
    others = [range(size) for axis, size in enumerate(rows.shape) if axis != 1]
    for first, *rest in itertools.product(*others):
        for start in range(0, rows.shape[1], m):
            columns = range(start, min(start + m, rows.shape[1]))
            order = sorted(columns, key=lambda c: (float(rows[(first, c, *rest)]), c))
            for c in order[len(order) - math.ceil(len(order) * n / m) :]:
                out[(first, c, *rest)] = True
    return kept


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:3", "1:1", "2:5"])
@pytest.mark.parametrize(
    "shape",
    [(6, 16), (3, 10), (5, 3), (2, 9, 3, 3), (4, 8, 1, 1), (4, 6, 5), (11,), (2, 5, 2, 2, 2)],
)
def test_pattern(shape, pattern, ties):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator)
    if ties:
        scores = scores.round()
    n, m = map(int, pattern.split(":"))
    masks = rank({"w": scores}, pattern=pattern)
    assert torch.equal(masks["w"], slow_pattern(scores, n, m))
    assert masks.recipe == {"pattern": pattern}


def test_pattern_keeps_exactly_n_of_m():
    masks = rank({"w": torch.zeros(8, 16, 3, 3), "v": torch.randn(4, 32)}, pattern="2:4")
    groups = masks["w"].reshape(8, 4, 4, 3, 3).sum(2)
    assert (groups == 2).all()
    assert (masks["v"].reshape(4, 8, 4).sum(2) == 2).all()
    assert masks.sparsity == 0.5


def test_pattern_with_the_sparsity_it_has():
    scores = {"w": torch.randn(4, 8)}
    assert rank(scores, 0.75, pattern="1:4") == rank(scores, pattern="1:4")
    assert rank(scores, pattern="1:4", floor=0.25).sparsity == 0.75


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\], got -0.1"),
        ({"sparsity": 1.0001}, r"sparsity must be in \[0, 1\], got 1.0001"),
        ({"sparsity": 70}, r"sparsity must be in \[0, 1\], got 70"),
        ({"sparsity": math.nan}, r"sparsity must be in \[0, 1\], got nan"),
        ({"sparsity": math.inf}, r"sparsity must be in \[0, 1\], got inf"),
        ({"sparsity": "0.5"}, "sparsity must be a number, got '0.5'"),
        ({"sparsity": True}, "sparsity must be a number, got True"),
        ({}, r"sparsity must be in \[0, 1\], got None"),
        (
            {"sparsity": 0.5, "scope": "local"},
            "scope must be 'global', 'layer' or 'erk', ",
        ),
        ({"sparsity": 0.5, "scope": None}, "scope must be .*, got None"),
        ({"sparsity": 0.5, "floor": -0.1}, r"floor must be in \[0, 1\], got -0.1"),
        ({"sparsity": 0.5, "floor": 1.5}, r"floor must be in \[0, 1\], got 1.5"),
        ({"sparsity": 0.5, "floor": math.nan}, r"floor must be in \[0, 1\], got nan"),
        ({"sparsity": 0.5, "floor": "a"}, "floor must be a number, got 'a'"),
        ({"sparsity": 0.5, "floor": 0.6}, r"sparsity 0.5 prunes 16 weights, but floor=0.6"),
        ({"sparsity": 0.5, "floor": 0.6, "scope": "layer"}, "sparsity 0.5 prunes 16"),
        (
            {"sparsity": 0.5, "floor": 0.6, "scope": "erk"},
            "sparsity 0.5 prunes .* weights, but the floor",
        ),
        ({"pattern": "2-4"}, "pattern must be 'N:M' .*, got '2-4'"),
        ({"pattern": "5:4"}, "pattern must be .*, got '5:4'"),
        ({"pattern": "0:4"}, "pattern must be .*, got '0:4'"),
        ({"pattern": "0:0"}, "pattern must be .*, got '0:0'"),
        ({"pattern": "2:4:8"}, "pattern must be .*, got '2:4:8'"),
        ({"pattern": "-2:4"}, "pattern must be .*, got '-2:4'"),
        ({"pattern": ""}, "pattern must be .*, got ''"),
        ({"pattern": 24}, "pattern must be .*, got 24"),
        (
            {"pattern": "2:4", "sparsity": 0.7},
            "sparsity must be None or 0.5 with .*got 0.7",
        ),
        (
            {"pattern": "1:4", "floor": 0.5},
            "floor must be at most 0.25 with .*got 0.5",
        ),
    ],
)
def test_arguments_that_are_not_taken(arguments, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        rank({"w": torch.randn(4, 8)}, **arguments)


def test_floor_and_sparsity_that_just_fit():
    """0.07 * 100 is a little more than seven in floating point, but seven is what is meant."""
    for scope in ("global", "layer", "erk"):
        for percent in range(101):
            masks = rank(
                {"w": torch.rand(100)}, 1 - percent / 100, floor=percent / 100, scope=scope
            )
            assert masks.kept["w"] == percent
    assert rank({"w": torch.rand(100)}, 0.5, floor=1e-9).kept["w"] == 50
    with pytest.raises(InvalidArgument, match="^sparsity .*floor="):
        rank({"w": torch.rand(100)}, 1.0, floor=1e-9)


@pytest.mark.parametrize("arguments", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "scores must hold at least one parameter"),
        ({"w": torch.zeros(0, 4)}, "scores must be non-empty .*got torch.float32 of shape"),
        ({"w": torch.zeros(4, dtype=torch.long)}, "scores must be .*floating .*got torch.int64"),
        ({"w": torch.zeros(4, dtype=torch.bool)}, "scores must be .*floating .*got torch.bool"),
        ({"a": torch.zeros(4), "w": torch.tensor([[0.0, 1.0], [math.nan, math.nan]])},
         "scores must not be NaN, got NaN at position 2 of 'w'"),
        ({"w": torch.tensor([math.nan], dtype=torch.float64)}, "scores must not be NaN, .* 0"),
    ],
)  # fmt: skip
def test_scores_that_are_not_taken(scores, message, arguments):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        rank(scores, **arguments)


def test_recipe():
    scores = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0])}
    assert rank(scores, 0.5, floor=0.25).recipe == {
        "scope": "global",
        "floor": 0.25,
        "sparsity": 0.5,
        "threshold": 2.0,
    }
    assert rank(scores, 0.0).recipe["threshold"] is None
    assert rank(scores, 0.5, scope="erk").recipe == {"scope": "erk", "floor": 0.0, "sparsity": 0.5}


def test_threads_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.randint(0, 5, (900, 700), generator=generator).float(),
        "b": torch.rand(64, 33, generator=generator),
        "c": torch.zeros(300_000),
    }
    cases = [{"sparsity": 0.4}, {"sparsity": 0.4, "floor": 0.3}, {"pattern": "2:4"}]
    cases += [{"sparsity": 0.4, "scope": scope} for scope in ("layer", "erk")]
    results = []
    for threads in (1, 2, 7):
        fastsal.set_num_threads(threads)
        try:
            assert fastsal.get_num_threads() == threads
            results.append([rank(scores, **case) for case in cases])
        finally:
            fastsal.set_num_threads(0)
    assert results[0] == results[1] == results[2]


def test_number_of_threads():
    with pytest.raises(InvalidArgument, match="^n must be at least 0, got -1"):
        fastsal.set_num_threads(-1)
    fastsal.set_num_threads(3)
    assert fastsal.get_num_threads() == 3
    fastsal.set_num_threads(0)
    assert fastsal.get_num_threads() >= 1
