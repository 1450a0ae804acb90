"""Sums of gradients = dense products in float64."""

from __future__ import annotations

import json
import math
import multiprocessing
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastsal
from fastsal import BlockFisher
from fastsal.errors import FileFormatError, InvalidArgument, NonFiniteGradient, UnknownParameter
from fastsal.fisher.block_fisher import sums_of

SHAPES = [(1,), (7,), (64,), (65,), (5, 13), (4, 3, 3, 3), (1, 1, 1), (10, 40)]
SIZES = [1, 7, 64, None, 1000]
TOLERANCE = {"float32": 1e-6, "float64": 1e-13}


pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(n, shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # A mean that is not zero, and weights of different scales.
    scale = torch.logspace(-2, 1, math.prod(shape)).reshape(shape)
    return ((torch.randn((n, *shape), generator=generator) + 0.3) * scale).to(dtype)


def dense_blocks(g, block_size, weights=None):
    """`sum_n w_n g_n g_nᵀ / sum_n w_n`, cut by slicing, short last block padded with zeros."""
    g = g.double().reshape(g.shape[0], -1)
    w = torch.ones(len(g), dtype=torch.float64) if weights is None else weights
    size = block_size or g.shape[1]
    blocks = []
    for start in range(0, g.shape[1], size):
        part = g[:, start : start + size]
        block = torch.zeros(size, size, dtype=torch.float64)
        block[: part.shape[1], : part.shape[1]] = part.T @ (w[:, None] * part) / w.sum()
        blocks.append(block)
    return torch.stack(blocks)


def assert_blocks(got, want, tolerance):
    """Entries agree to `tolerance √(F_ii F_jj)`."""
    assert got.dtype == torch.float64
    assert got.shape == want.shape
    root = want.diagonal(dim1=1, dim2=2).sqrt()
    scale = root[:, :, None] * root[:, None, :]
    # Where the scale is zero, in the padding, nothing but zero is taken.
    assert ((got - want).abs() <= tolerance * scale).all()


def fed(parts, shape, block_size, precision="float32"):
    fisher = BlockFisher({"w": shape}, block_size=block_size, precision=precision)
    for part in parts:
        fisher.update({"w": part})
    return fisher


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("block_size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_equal_dense_products(shape, block_size, precision):
    g = gradients(131, shape, dtype=getattr(torch, precision))
    fisher = fed([g], shape, block_size, precision)
    tolerance = TOLERANCE[precision]
    size = math.prod(shape) if block_size is None else block_size
    assert fisher.blocks("w").shape == (-(-math.prod(shape) // size), size, size)
    assert_blocks(fisher.blocks("w"), dense_blocks(g, block_size), tolerance)
    exact = g.double()
    torch.testing.assert_close(
        fisher.diagonal()["w"], exact.square().mean(0), rtol=tolerance, atol=0
    )
    error = (fisher.mean_gradient()["w"] - exact.mean(0)).abs()
    assert (error <= tolerance * exact.square().mean(0).sqrt()).all()
    assert fisher.samples == 131
    assert isinstance(fisher.samples, int)


def test_parameters_do_not_mix():
    shapes = {"a": (3, 5), "b": (70,), "c": ()}
    g = {name: gradients(40, shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    fisher = BlockFisher(shapes, block_size=8)
    fisher.update(dict(reversed(g.items())))
    assert fisher.names == list(shapes)
    for name in shapes:
        assert_blocks(fisher.blocks(name), dense_blocks(g[name], 8), 1e-6)
        assert fisher.diagonal()[name].shape == shapes[name]


@pytest.mark.parametrize("block_size", [7, None])
@pytest.mark.parametrize("n", [1, 3, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_of_rows(dtype, n, block_size):
    g = gradients(n, (4, 9), dtype=dtype)
    assert_blocks(
        fed([g], (4, 9), block_size).blocks("w"), dense_blocks(g, block_size), TOLERANCE["float32"]
    )
    assert_blocks(
        fed([g], (4, 9), block_size, "float64").blocks("w"), dense_blocks(g, block_size), 1e-13
    )


LAYOUTS = {
    "every second row": lambda g: g[::2],
    "every second weight": lambda g: gradients(len(g), (18, 4))[:, ::2],
    "transposed": lambda g: gradients(len(g), (4, 9)).transpose(1, 2),
    "rows last": lambda g: gradients(9, (4, len(g))).permute(2, 0, 1),
    "channels last": lambda g: gradients(len(g), (9, 2, 2)).to(
        memory_format=torch.channels_last
    ).reshape(len(g), 9, 4),
    "one row for all": lambda g: g[:1].expand(len(g), 9, 4),
    "one weight for all": lambda g: g[:, :1, :1].expand(len(g), 9, 4),
    "one value for all": lambda g: g[:1, :1, :1].expand(len(g), 9, 4),
    "overlapping rows": lambda g: g.reshape(-1).unfold(0, 36, 1)[: len(g)].reshape(-1, 9, 4),
    "offset": lambda g: g.reshape(-1)[3 : 3 + 36 * (len(g) - 1)].reshape(-1, 9, 4),
    "needs grad": lambda g: g.clone().requires_grad_(),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_tensors(layout, dtype):
    g = LAYOUTS[layout](gradients(50, (9, 4))).to(dtype)
    assert g.shape[1:] == (9, 4)
    before = g.detach().clone()
    for some in (g, g[:2]):
        fisher = fed([some], (9, 4), 7)
        assert_blocks(fisher.blocks("w"), dense_blocks(some.detach(), 7), 1e-6)
    assert torch.equal(g.detach(), before)


def test_kept_gradients_are_copies():
    g = gradients(2, (9,))
    fisher = fed([g], (9,), None)
    want = dense_blocks(g, None)
    g.fill_(100)
    assert_blocks(fisher.blocks("w"), want, 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=6),
    st.sampled_from([1, 5, 64, None]),
    st.sampled_from(["float32", "float64"]),
)
def test_any_split_is_the_same(counts, block_size, precision):
    g = gradients(sum(counts), (6, 11))
    split = fed(g.split(counts), (6, 11), block_size, precision)
    assert split.samples == len(g)
    at_once = fed([g], (6, 11), block_size, precision)
    tolerance = TOLERANCE[precision]
    want = dense_blocks(g, block_size)
    assert_blocks(split.blocks("w"), want, tolerance)
    assert_blocks(at_once.blocks("w"), want, tolerance)
    torch.testing.assert_close(
        split.diagonal()["w"], at_once.diagonal()["w"], rtol=2 * tolerance, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hundred_thousand_rows(dtype):
    g = gradients(100_000, (12,), dtype=dtype)
    want = dense_blocks(g, 5)
    for step in (100_000, 1_000, 64):
        assert_blocks(fed(g.split(step), (12,), 5).blocks("w"), want, 1e-5)


# The dual form: gradients themselves, while they are few.

DUAL = [((6, 50), 3, None), ((6, 50), 40, None), ((4, 3, 3, 3), 9, 64), ((130,), 1, 64)]


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "n", "block_size"), DUAL)
def test_dual_equals_primal(shape, n, block_size, precision):
    g = gradients(n, shape)
    dual = fed([g], shape, block_size, precision)
    primal = fed([g], shape, block_size, precision)
    sums_of(primal).parameters["w"].fold()
    assert sums_of(dual).parameters["w"].packed is None
    assert dual.nbytes < primal.nbytes
    tolerance = TOLERANCE[precision]
    want = dense_blocks(g, block_size)
    assert_blocks(dual.blocks("w"), want, tolerance)
    assert sums_of(dual).parameters["w"].packed is None, "looking must not change what is kept"
    for name in ("diagonal", "mean_gradient"):
        a, b = getattr(dual, name)()["w"], getattr(primal, name)()["w"]
        torch.testing.assert_close(a, b, rtol=2 * tolerance, atol=2 * tolerance)
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(shape, generator=generator) < 0.7
    for masks in (None, {"w": kept}):
        a = dual.inverse_diagonals(1.0, masks)["w"]
        b = primal.inverse_diagonals(1.0, masks)["w"]
        assert a.failed == b.failed == []
        bound = b.errors.max() + 1e-12
        assert abs(a.values / b.values - 1).max() < min(bound, 1e-3)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.randn(shape, generator=generator))
    a, b = (fastsal.score(model, f, "block-fisher", 1.0)["w"] for f in (dual, primal))
    torch.testing.assert_close(a, b, rtol=1e-4 if precision == "float32" else 1e-6, atol=0)


@pytest.mark.parametrize("block_size", [9, None])
def test_folds_when_more_samples_come(block_size):
    g = gradients(60, (4, 9))
    fisher = fed([g[:2]], (4, 9), block_size)
    assert sums_of(fisher).parameters["w"].packed is None
    assert_blocks(fisher.blocks("w"), dense_blocks(g[:2], block_size), 1e-6)
    for end in range(3, 61):
        fisher.update({"w": g[end - 1 : end]})
    assert sums_of(fisher).parameters["w"].packed is not None
    assert sums_of(fisher).parameters["w"].rows == []
    assert_blocks(fisher.blocks("w"), dense_blocks(g, block_size), 1e-6)
    torch.testing.assert_close(
        fisher.mean_gradient()["w"], g.double().mean(0), rtol=1e-5, atol=1e-5
    )


# Merging.


@pytest.mark.parametrize("weight", [1, 0.25, 3.5])
@pytest.mark.parametrize("block_size", [9, None])
@pytest.mark.parametrize(
    ("first", "second"), [(2, 2), (2, 50), (50, 2), (50, 50), (4, 3), (17, 17)]
)
@pytest.mark.parametrize("precisions", [("float32", "float32"), ("float64", "float32")])
def test_merge(first, second, block_size, weight, precisions):
    g = gradients(first + second, (4, 9))
    a = fed([g[:first]], (4, 9), block_size, precisions[0])
    b = fed([g[first:]], (4, 9), block_size, precisions[1])
    before = (
        b.samples,
        b.blocks("w"),
        b.mean_gradient()["w"],
        sums_of(b).parameters["w"].packed is None,
    )
    a.merge(b, weight)
    weights = torch.cat([torch.ones(first), torch.full((second,), float(weight))]).double()
    assert_blocks(a.blocks("w"), dense_blocks(g, block_size, weights), 1e-6)
    want = (weights[:, None, None] * g.double()).sum(0) / weights.sum()
    torch.testing.assert_close(a.mean_gradient()["w"], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        a.diagonal()["w"],
        (weights[:, None, None] * g.double().square()).sum(0) / weights.sum(),
        rtol=1e-6,
        atol=0,
    )
    assert a.samples == first + weight * second
    # Further samples count one each, and change this one alone.
    a.update({"w": g})
    twice = torch.cat([weights, torch.ones(len(g)).double()])
    assert_blocks(a.blocks("w"), dense_blocks(torch.cat([g, g]), block_size, twice), 1e-6)
    assert b.samples == before[0]
    assert torch.equal(b.blocks("w"), before[1])
    assert torch.equal(b.mean_gradient()["w"], before[2])
    assert (sums_of(b).parameters["w"].packed is None) == before[3]


@pytest.mark.parametrize("n", [2, 4, 50])
def test_merge_with_itself(n):
    g = gradients(n, (9,))
    fisher = fed([g], (9,), 9)
    fisher.merge(fisher)
    assert fisher.samples == 2 * n
    assert_blocks(fisher.blocks("w"), dense_blocks(g, 9), 1e-6)


def test_merge_into_nothing():
    g = gradients(20, (9,))
    fisher = BlockFisher({"w": (9,)}, block_size=4)
    fisher.merge(fed([g], (9,), 4), 0.5)
    assert fisher.samples == 10
    assert_blocks(fisher.blocks("w"), dense_blocks(g, 4), 1e-6)


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, "1", None])
def test_merge_refuses_weights(weight):
    fisher = fed([gradients(3, (9,))], (9,), 4)
    with pytest.raises(InvalidArgument, match="^weight must be .*, got"):
        fisher.merge(fed([gradients(3, (9,))], (9,), 4), weight)
    assert fisher.samples == 3


@pytest.mark.parametrize(
    "other",
    [
        BlockFisher({"w": (9,)}, block_size=5),
        BlockFisher({"w": (3, 3)}, block_size=4),
        BlockFisher({"v": (9,)}, block_size=4),
        BlockFisher({"w": (9,), "v": (9,)}, block_size=4),
    ],
)
def test_merge_refuses_other_models(other):
    with pytest.raises(InvalidArgument, match="^other must have the same parameters"):
        fed([gradients(3, (9,))], (9,), 4).merge(other)


# Files.


def statistics(n, precision="float32"):
    fisher = BlockFisher({"a.w": (4, 9), "b": (3,)}, block_size=9, precision=precision)
    fisher.update({"a.w": gradients(n, (4, 9)), "b": gradients(n, (3,), seed=1)})
    return fisher


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("n", [2, 40])
def test_save_and_load(tmp_path, n, precision):
    fisher = statistics(n, precision)
    fisher.merge(statistics(1, precision), 0.125)
    assert (sums_of(fisher).parameters["a.w"].packed is None) == (n == 2)
    path = tmp_path / "folder" / "fisher.safetensors"
    fisher.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = BlockFisher.load(path)
    for attribute in ("samples", "block_size", "precision", "names", "shapes", "nbytes"):
        assert getattr(loaded, attribute) == getattr(fisher, attribute), attribute
    more = {name: gradients(5, shape) for name, shape in fisher.shapes.items()}
    for _ in range(2):  # as they are, and after more samples
        for name in fisher.names:
            assert torch.equal(loaded.blocks(name), fisher.blocks(name))
            assert torch.equal(loaded.mean_gradient()[name], fisher.mean_gradient()[name])
            for x, y in zip(
                vars(loaded.inverse_diagonals(0.1)[name]).values(),
                vars(fisher.inverse_diagonals(0.1)[name]).values(),
                strict=True,
            ):
                assert list(x) == list(y)
        loaded.update(more)
        fisher.update(more)


def test_save_and_load_of_nothing(tmp_path):
    BlockFisher({"w": (9,)}, block_size=None).save(tmp_path / "f")
    loaded = BlockFisher.load(tmp_path / "f")
    assert (loaded.samples, loaded.block_size) == (0, None)


def test_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: there is no file"):
        BlockFisher.load(tmp_path / "none")


@pytest.mark.parametrize("n", [2, 40])
def test_load_truncated(tmp_path, n):
    path = tmp_path / "f"
    statistics(n).save(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="path: "):
            BlockFisher.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileFormatError, match="path: "):
        BlockFisher.load(path)


@pytest.mark.parametrize("n", [2, 40])
def test_load_flipped_bits(tmp_path, read_flipped, n):
    path = tmp_path / "f"
    fisher = statistics(n)
    fisher.save(path)
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, data, 5), data, data + 5, len(whole) - 1]
    flips = [(at, bit) for at in places for bit in (at % 8, 7)]
    for _, loaded in read_flipped(path, BlockFisher.load, flips):
        assert torch.equal(loaded.blocks("a.w"), fisher.blocks("a.w"))


def test_load_foreign_files(tmp_path):
    path = tmp_path / "f"
    statistics(40).save(path)
    tensors = load_file(path)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["fastsal"])
    fastsal.Masks({"w": torch.ones(3)}).save(tmp_path / "masks")
    with pytest.raises(FileFormatError, match="is not a file of fastsal.BlockFisher"):
        BlockFisher.load(tmp_path / "masks")
    wrong = [
        {},
        [],
        "",
        {**header, "version": 2},
        {**header, "samples": 2 * header["samples"]},
        {**header, "block_size": 4},
        {**header, "shapes": {"a.w": [36], "b": [3]}},
        {**header, "shapes": []},
        {**header, "precision": "float64"},
        {k: v for k, v in header.items() if k != "digest"},
    ]
    for metadata in [None, *({"fastsal": json.dumps(h)} for h in wrong), {"fastsal": "{"}]:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(FileFormatError, match="path: "):
            BlockFisher.load(path)


# Refusals leave everything as it was.


def refused():
    good = {"a": gradients(4, (3, 2)), "b": gradients(4, (5,))}
    nan = gradients(4, (5,))
    nan[2, 3] = math.nan
    infinite = gradients(4, (3, 2))
    infinite[1, 2, 1] = -math.inf
    return {
        "missing": ({"a": good["a"]}, UnknownParameter, "missing 'b'"),
        "unknown": ({**good, "c": good["b"]}, UnknownParameter, "unknown 'c'"),
        "no sample axis": ({**good, "b": good["b"][0]}, InvalidArgument, "'b' must have"),
        "shape": ({**good, "b": good["b"][:, :4]}, InvalidArgument, "'b' must have"),
        "flattened": ({**good, "a": good["a"].reshape(4, 6)}, InvalidArgument, "'a' must have"),
        "counts": ({**good, "b": good["b"][:3]}, InvalidArgument, "samples"),
        "no samples": ({k: v[:0] for k, v in good.items()}, InvalidArgument, "samples"),
        "integers": ({**good, "b": good["b"].long()}, InvalidArgument, "'b' .*got torch.int64"),
        "complex": ({**good, "b": good["b"].cfloat()}, InvalidArgument, "'b' .*torch.complex64"),
        "NaN": ({**good, "b": nan}, NonFiniteGradient, r"got nan for 'b', sample \d+, at \[3\]"),
        "infinite": (
            {**good, "a": infinite.half()},
            NonFiniteGradient,
            r"got -inf for 'a', sample \d+, at \[2, 1\]",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("n", [0, 2, 30])
@pytest.mark.parametrize("case", refused())
def test_refused_updates_add_nothing(case, n):
    update, error, message = refused()[case]
    fisher = BlockFisher({"a": (3, 2), "b": (5,)}, block_size=4)
    if n:
        fisher.update({"a": gradients(n, (3, 2)), "b": gradients(n, (5,))})
        before = {name: fisher.blocks(name) for name in fisher.names}
        mean = fisher.mean_gradient()
    with pytest.raises(error, match=f"^gradients .*{message}") as caught:
        fisher.update(update)
    if case == "NaN":
        assert f"sample {n + 2}, " in str(caught.value)
    assert fisher.samples == n
    if n:
        for name in fisher.names:
            assert torch.equal(fisher.blocks(name), before[name])
            assert torch.equal(fisher.mean_gradient()[name], mean[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": -3}, "block_size must be at least 1, got -3"),
        ({"block_size": 2.5}, "block_size must be an integer, got 2.5"),
        ({"precision": "float16"}, "precision must be 'float32' or 'float64', got 'float16'"),
        ({"shapes": {}}, "shapes must hold at least one parameter"),
        ({"shapes": {"w": (3, 0)}}, r"shapes must be .*, got \(3, 0\) for 'w'"),
        ({"shapes": {"w": (-3, -1)}}, r"shapes must be .*, got \(-3, -1\) for 'w'"),
    ],
)
def test_refused_constructions(arguments, message):
    shapes = arguments.pop("shapes", {"w": (3,)})
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        BlockFisher(shapes, **arguments)


def test_nothing_can_be_read_before_samples():
    fisher = BlockFisher({"w": (3,)})
    for call in (
        lambda: fisher.blocks("w"),
        fisher.diagonal,
        fisher.mean_gradient,
        lambda: fisher.inverse_diagonals(1.0),
    ):
        with pytest.raises(InvalidArgument, match="fisher has no samples"):
            call()
    fisher.update({"w": torch.ones(1, 3)})
    with pytest.raises(UnknownParameter, match="name must be one of 'w', got 'v'"):
        fisher.blocks("v")


# Processes.


def _update_in_child(connection, fisher, g):
    fisher.update({"w": g})
    connection.send((fisher.samples, fisher.diagonal()["w"].tolist()))
    connection.close()


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs a system with fork"
)
def test_child_made_by_fork_can_update():
    context = multiprocessing.get_context("fork")
    g = gradients(64, (50_000,))
    fastsal.set_num_threads(2)
    try:
        fisher = fed([g], (50_000,), 64)  # starts the pool in this process
        receiver, sender = context.Pipe(duplex=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = context.Process(target=_update_in_child, args=(sender, fisher, g), daemon=True)
            child.start()
        sender.close()
        try:
            assert receiver.poll(60), "the child hangs"
            samples, diagonal = receiver.recv()
            child.join(60)
            assert child.exitcode == 0
        finally:
            if child.is_alive():
                child.kill()
        fisher.update({"w": g})  # the parent's pool still works, and gives the same
        assert samples == fisher.samples == 128
        assert diagonal == fisher.diagonal()["w"].tolist()
    finally:
        fastsal.set_num_threads(0)
