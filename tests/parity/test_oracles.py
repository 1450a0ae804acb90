"""The compiled core equals slow, obvious float64 torch."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsal
from fastsal import _core
from fastsal.errors import FactorizationError, FileFormatError, InvalidArgument, NonFiniteGradient

SHAPES = {"fc.weight": (10, 13), "conv.weight": (4, 3, 3, 3), "bias": (5,), "one": (1,)}


def gradients(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def filled(n: int, block_size: int | None = 7, precision: str = "float64") -> fastsal.BlockFisher:
    fisher = fastsal.BlockFisher(SHAPES, block_size=block_size, precision=precision)
    fisher.update(gradients(n))
    return fisher


def dense_blocks(rows: torch.Tensor, block_size: int) -> torch.Tensor:
    """`GᵀG / N` block by block, padded with zeros."""
    flat = rows.double().flatten(1)
    blocks = []
    for start in range(0, flat.shape[1], block_size):
        part = flat[:, start : start + block_size]
        block = torch.zeros(block_size, block_size, dtype=torch.float64)
        block[: part.shape[1], : part.shape[1]] = part.T @ part / len(rows)
        blocks.append(block)
    return torch.stack(blocks)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float64, "float64", 1e-14),
        (torch.float32, "float64", 1e-14),
        (torch.float32, "float32", 1e-6),
        (torch.bfloat16, "float32", 1e-6),
        (torch.float16, "float32", 1e-6),
    ],
)
def test_blocks_equal_dense(block_size, dtype, precision, tolerance):
    rows = gradients(150, dtype)
    fisher = fastsal.BlockFisher(SHAPES, block_size=block_size, precision=precision)
    fisher.update(rows)
    for name, g in rows.items():
        close(fisher.blocks(name), dense_blocks(g, block_size), tolerance)
        close(fisher.diagonal()[name], g.double().square().mean(0), tolerance)
        close(fisher.mean_gradient()[name], g.double().mean(0), 10 * tolerance)


def test_strided_rows():
    rows = gradients(40)
    expected = filled(40).blocks("fc.weight")
    tricks = {
        "apart": lambda g: torch.cat([g, g], dim=1)[:, : g.shape[1]],
        "transposed": lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0),
        "expanded": lambda g: g[:1].expand(40, *g.shape[1:]),
    }
    for name, trick in tricks.items():
        changed = {n: trick(g) if g[0].dim() else g for n, g in rows.items()}
        fisher = fastsal.BlockFisher(SHAPES, block_size=7, precision="float64")
        fisher.update(changed)
        if name == "expanded":
            expected = dense_blocks(changed["fc.weight"], 7)
        close(fisher.blocks("fc.weight"), expected, 1e-14)


@pytest.mark.parametrize("step", [1, 3, 64, 150])
@pytest.mark.parametrize("block_size", [7, 64])
def test_any_split_gives_the_same(step, block_size):
    rows = gradients(150)
    fisher = fastsal.BlockFisher(SHAPES, block_size=block_size)
    for start in range(0, 150, step):
        fisher.update({name: g[start : start + step] for name, g in rows.items()})
    assert fisher.samples == 150
    for name, g in rows.items():
        close(fisher.blocks(name), dense_blocks(g, block_size), 1e-6)


def test_many_rows_keep_their_precision():
    generator = torch.Generator().manual_seed(0)
    fisher = fastsal.BlockFisher({"w": (16,)}, block_size=16)
    exact = torch.zeros(16, 16, dtype=torch.float64)
    for _ in range(100):
        g = torch.randn(1000, 16, generator=generator) + 0.3
        fisher.update({"w": g})
        exact += g.double().T @ g.double()
    close(fisher.blocks("w")[0], exact / 100_000, 1e-5)


@pytest.mark.parametrize("damping", [1e-8, 1e-5, 1e-2, 10.0])
@pytest.mark.parametrize("n", [2, 3, 200])
def test_inverse_diagonal_equals_torch(damping, n):
    # Few samples: the dual form; many: packed blocks.
    fisher = filled(n)
    inverses = fisher.inverse_diagonals(damping)
    for name, shape in SHAPES.items():
        blocks = fisher.blocks(name)
        eye = torch.eye(blocks.shape[1], dtype=torch.float64)
        expected = torch.linalg.inv(blocks + damping * eye).diagonal(dim1=1, dim2=2).flatten()
        got = torch.from_numpy(inverses[name].values)
        relative = (got / expected[: np.prod(shape)] - 1).abs().max()
        assert float(relative) < 1e-6
        assert inverses[name].failed == []


@pytest.mark.parametrize("n", [5, 60])
def test_dual_equals_primal(n):
    whole = filled(n, block_size=None)  # 130 weights, fewer samples: gradients are kept
    name = "fc.weight"
    assert whole._parameters[name].packed is None
    packed = filled(n, block_size=None)
    packed._parameters[name].fold()
    for damping in (1e-4, 1.0):
        dual = whole.inverse_diagonals(damping)[name].values
        primal = packed.inverse_diagonals(damping)[name].values
        assert np.abs(dual / primal - 1).max() < 1e-8
    close(whole.blocks(name), packed.blocks(name), 1e-12)
    close(whole.diagonal()[name], packed.diagonal()[name], 1e-12)


def test_pruned_weights_take_no_part():
    fisher, damping, name = filled(200, block_size=7), 1e-3, "fc.weight"
    kept = torch.rand(SHAPES[name], generator=torch.Generator().manual_seed(1)) > 0.4
    values = fisher.inverse_diagonals(damping, {name: kept})[name].values
    flat = kept.flatten()
    for b, block in enumerate(fisher.blocks(name)):
        own = flat[7 * b : 7 * b + 7].nonzero().flatten()
        a = block[own][:, own] + damping * torch.eye(len(own), dtype=torch.float64)
        expected = torch.linalg.inv(a).diagonal()
        close(torch.from_numpy(values[7 * b : 7 * b + 7])[own], expected, 1e-10)


def test_error_bound_holds_and_warns():
    g = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(0, -3, 64)
    )
    single = fastsal.BlockFisher({"w": (64,)})
    exact = fastsal.BlockFisher({"w": (64,)}, precision="float64")
    for part in g.split(32):
        single.update({"w": part})
        exact.update({"w": part})
    for damping in (1e-2, 1e-4, 1e-5):
        ours, truth = (f.inverse_diagonals(damping)["w"] for f in (single, exact))
        assert np.abs(ours.values / truth.values - 1).max() <= ours.errors.max()
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.ones(64))
    with pytest.warns(fastsal.PrecisionWarning, match="'w'"):
        fastsal.score(model, single, "block-fisher", 1e-8)


def test_failed_blocks_are_named():
    fisher = fastsal.BlockFisher({"w": (64,)}, block_size=8)
    fisher.update({"w": torch.full((100, 64), 1e25)})  # the squares overflow float32
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.ones(64))
    for criterion in ("block-fisher", "obs-greedy"):
        with pytest.raises(FactorizationError, match="'w'"):
            fastsal.score(model, fisher, criterion, 1e-5)
    with pytest.raises(FactorizationError, match="'w'"):
        fastsal.compensate(model, fisher, {"w": torch.zeros(64, dtype=torch.bool)}, 1e-5)
    assert bool((model.w == 1).all())


def slow_greedy(theta: torch.Tensor, a: torch.Tensor) -> tuple[list[int], list[float]]:
    """Remove one weight after another from `A⁻¹`, float64."""
    theta, h = theta.clone(), torch.linalg.inv(a)
    alive, order, costs = list(range(len(theta))), [], []
    while alive:
        cost = {j: float(theta[j] ** 2 / (2 * h[j, j])) for j in alive}
        j = min(alive, key=lambda k: cost[k])
        order.append(j)
        costs.append(cost[j])
        theta = theta - h[:, j] * theta[j] / h[j, j]
        h = h - torch.outer(h[:, j], h[j]) / h[j, j]
        alive.remove(j)
    return order, costs


@pytest.mark.parametrize("size", [1, 5, 64, 130])
def test_greedy_equals_slow(size):
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(size, generator=generator)
    g = torch.randn(2 * size + 1, size, generator=generator)
    fisher = fastsal.BlockFisher({"w": (size,)}, block_size=size, precision="float64")
    fisher.update({"w": g})
    fisher._parameters["w"].fold()
    parameters, block = fisher._borrow_all(None)
    scores, turns, failed = _core.eliminate(parameters, [theta.numpy()], block, 1e-3)[0]
    a = fisher.blocks("w")[0] + 1e-3 * torch.eye(size, dtype=torch.float64)
    order, costs = slow_greedy(theta.double(), a)
    assert failed == []
    assert np.argsort(turns).tolist() == order
    close(torch.from_numpy(scores[order]), torch.tensor(costs).cummax(0).values, 1e-6)


def joint(theta, a, kept):
    """`θ_K + A_KK⁻¹ A_KP θ_P`, zero elsewhere."""
    k, p = kept.nonzero().flatten(), (~kept).nonzero().flatten()
    moved = torch.zeros_like(theta)
    moved[k] = theta[k] + torch.linalg.solve(a[k][:, k], a[k][:, p] @ theta[p])
    return moved


@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 24), share=st.floats(0, 1))
def test_joint_compensation(seed, size, share):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.randn(size, generator=generator))
    theta = model.w.detach().double()
    fisher = fastsal.BlockFisher({"w": (size,)}, block_size=size, precision="float64")
    fisher.update({"w": torch.randn(size + 3, size, generator=generator, dtype=torch.float64)})
    a = fisher.blocks("w")[0] + 1e-2 * torch.eye(size, dtype=torch.float64)
    kept = torch.rand(size, generator=generator) >= share
    report = fastsal.compensate(model, fisher, {"w": kept}, 1e-2)
    expected = joint(theta, a, kept)
    assert float((model.w.detach().double() - expected).abs().max()) < 1e-6 * max(
        1, float(expected.abs().max())
    )

    def increase(to: torch.Tensor) -> float:
        return float((to - theta) @ a @ (to - theta) / 2)

    inverse = torch.linalg.inv(a)
    independent = theta - inverse @ (torch.where(kept, 0.0, theta) / inverse.diagonal())
    slack = 1e-9 * (1 + increase(theta * kept))
    assert abs(report.total - increase(expected)) <= slack
    assert abs(report.total_uncompensated - increase(theta * kept)) <= slack
    assert report.total <= increase(independent * kept) + slack
    assert report.total <= increase(theta * kept) + slack


def test_merge_equals_weighted_sums():
    for n, m in ((2, 1), (2, 100), (100, 2), (100, 90)):  # kept gradients, packed, and both
        for weight in (1.0, 0.25):
            a, b = filled(n), fastsal.BlockFisher(SHAPES, block_size=7, precision="float64")
            rows = gradients(m, seed=5)
            b.update(rows)
            before = b.blocks("fc.weight")
            a.merge(b, weight)
            own = gradients(n)
            total = n + weight * m
            assert a.samples == total
            for name, g in own.items():
                expected = (
                    n * dense_blocks(g, 7) + weight * m * dense_blocks(rows[name], 7)
                ) / total
                close(a.blocks(name), expected, 1e-12)
                mean = (g.double().sum(0) + weight * rows[name].double().sum(0)) / total
                close(a.mean_gradient()[name], mean, 1e-6)
            assert torch.equal(b.blocks("fc.weight"), before)
    with pytest.raises(InvalidArgument, match="weight"):
        filled(3).merge(filled(3), -1)
    with pytest.raises(InvalidArgument, match="other"):
        filled(3).merge(filled(3, block_size=8))


@pytest.mark.parametrize("n", [3, 100])
def test_file_round_trip(tmp_path, n):
    fisher = filled(n, precision="float32")
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    loaded = fastsal.BlockFisher.load(path)
    assert (loaded.samples, loaded.names, loaded.block_size) == (n, list(SHAPES), 7)
    assert torch.equal(loaded.blocks("conv.weight"), fisher.blocks("conv.weight"))
    assert torch.equal(loaded.mean_gradient()["bias"], fisher.mean_gradient()["bias"])
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 4):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError):
            fastsal.BlockFisher.load(path)
    with pytest.raises(FileNotFoundError):
        fastsal.BlockFisher.load(tmp_path / "none")


def test_bad_updates_change_nothing():
    fisher = filled(20)
    before = fisher.blocks("fc.weight")
    good = gradients(4)
    for value in (float("nan"), float("inf")):
        bad = {name: g.clone() for name, g in good.items()}
        bad["one"][2, 0] = value
        with pytest.raises(NonFiniteGradient, match=r"'one'.*sample 22"):
            fisher.update(bad)
    wrong = [
        {**good, "bias": good["bias"][:, :4]},
        {**good, "bias": good["bias"][:3]},
        {**good, "bias": good["bias"].int()},
        {name: g[:0] for name, g in good.items()},
        {"bias": good["bias"]},
        {**good, "other": good["bias"]},
    ]
    for rows in wrong:
        with pytest.raises(InvalidArgument, match="gradients"):
            fisher.update(rows)
    assert fisher.samples == 20
    assert torch.equal(fisher.blocks("fc.weight"), before)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_do_not_depend_on_threads(threads):
    fastsal.set_num_threads(threads)
    try:
        g = torch.randn(100, 300, 40, generator=torch.Generator().manual_seed(0))
        fisher = fastsal.BlockFisher({"w": (300, 40)})
        fisher.update({"w": g})
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(g[0].round(decimals=1))
        result = [fisher.blocks("w")]
        for criterion in ("magnitude", "block-fisher", "obs-greedy"):
            scores = fastsal.score(model, fisher, criterion, 1e-2)
            result += [scores["w"], fastsal.rank(scores, 0.37)["w"]]
    finally:
        fastsal.set_num_threads(0)
    reference = _REFERENCE.setdefault("one thread", result)
    assert all(torch.equal(a, b) for a, b in zip(result, reference, strict=True))


_REFERENCE: dict[str, list[torch.Tensor]] = {}


def _child(queue: multiprocessing.Queue) -> None:
    queue.put(float(filled(50).blocks("fc.weight").sum()))


@pytest.mark.filterwarnings("ignore:This process")
def test_pool_survives_fork():
    expected = float(filled(50).blocks("fc.weight").sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(10)
        child.kill()
