"""What the compiled core takes: arrays as they come, or an error that says what is wrong."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal import _core
from fastsal.errors import FileFormatError, InvalidArgument

B = 64
D = 256


def core_parameter(kept=None, d=D, block=B, precision=np.float32):
    """Statistics of random gradients, as the core takes them."""
    rows = np.random.default_rng(0).standard_normal((90, d)).astype(precision)
    packed, sums = np.zeros(_core.packed_len(d, block), precision), np.zeros(d, precision)
    _core.accumulate(rows, rows.dtype.name, block, packed, sums)
    return packed, d, 90.0, kept


def weights_of(d=D):
    return np.random.default_rng(1).standard_normal(d).astype(np.float32)


# Bytes that NumPy and PyTorch may hold in an array of booleans.
ODD = np.arange(D, dtype=np.uint8)
CLEAN = ODD != 0


@pytest.mark.parametrize("shuffled", [False, True])
def test_boolean_arrays_are_read_as_bytes(shuffled):
    odd = np.random.default_rng(2).permutation(ODD) if shuffled else ODD
    odd = odd & np.where(np.arange(D) % 3, 255, 0).astype(np.uint8)
    clean, bad = odd != 0, odd.view(np.bool_)
    weights = weights_of()
    for call in (
        lambda mask: _core.eliminate([core_parameter(mask)], [weights], B, 1e-3)[0][0],
        lambda mask: _core.inverse_diagonal([core_parameter(mask)], B, 1e-3)[0][0],
        lambda mask: _core.inverse([core_parameter(mask)], B, 1e-3)[0][0],
        lambda mask: _core.compensate([core_parameter()], [weights], [mask], B, 1e-3)[0][0],
        lambda mask: _core.compensate([core_parameter(mask)], [weights], [CLEAN], B, 1e-3)[0][0],
        lambda mask: _core.n_of_m_joint(
            [core_parameter(mask)], [weights], [(1, D, 1)], B, 2, 4, 1e-3
        )[0][0],
        lambda mask: _core.dual_inverse_diagonal(
            np.ones((3, D), np.float32), "float32", B, 3.0, mask, 1e-3
        )[0],
    ):
        np.testing.assert_array_equal(call(bad), call(clean))
        np.testing.assert_array_equal(call(np.repeat(bad, 2)[::2]), call(clean))


class Holder(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())


@pytest.fixture
def fisher():
    found = fastsal.BlockFisher({"w": (4, B)}, block_size=B)
    found.update({"w": torch.randn(90, 4, B, generator=torch.Generator().manual_seed(0))})
    return found


@pytest.fixture
def weights():
    return torch.randn(4, B, generator=torch.Generator().manual_seed(1))


def test_boolean_tensors_are_read_as_bytes(fisher, weights):
    odd = torch.from_numpy(np.random.default_rng(3).permutation(ODD)).reshape(4, B)
    odd[:, ::2] = 0
    bad, clean = {"w": odd.view(torch.bool)}, {"w": odd != 0}
    masks = fastsal.Masks(bad)
    assert masks == fastsal.Masks(clean)
    assert masks.kept == {"w": int(clean["w"].sum())}
    assert masks["w"].view(torch.uint8).max() == 1
    for criterion in ("magnitude", "block-fisher", "obs-greedy"):
        scores = [
            fastsal.score(Holder(weights), fisher, criterion, 1e-3, masks=m)["w"]
            for m in (bad, clean)
        ]
        assert torch.equal(*scores)
    for before in (None, clean, bad):
        moved = []
        for given in (bad, clean):
            model = Holder(weights)
            fastsal.compensate(model, fisher, given, 1e-3, before=before)
            moved.append(model.w.detach())
        assert torch.equal(*moved)
    inverses = [fisher.inverse_diagonals(1e-3, m)["w"].values for m in (bad, clean)]
    np.testing.assert_array_equal(*inverses)


def arrays_in(memory, *places):
    """Arrays in the memory of a tensor, from start to stop, that do not know of each other."""
    return [memory[start:stop].numpy() for start, stop in places]


def misaligned(values):
    memory = np.zeros(values.nbytes + 1, np.uint8)
    odd = memory[1:].view(values.dtype).reshape(values.shape)
    odd[...] = values
    return odd


def refused_arrays():
    def add(rows=None, packed=None, sums=None, dtype="float32"):
        rows = np.ones((3, D), np.float32) if rows is None else rows
        packed = np.zeros(_core.packed_len(D, B), np.float32) if packed is None else packed
        sums = np.zeros(D, np.float32) if sums is None else sums
        _core.accumulate(rows, dtype, B, packed, sums)

    def frozen(a):
        a.flags.writeable = False
        return a

    length = _core.packed_len(D, B)
    wide = np.zeros(length + D, np.float32)
    same = np.zeros(length, np.float32)
    scores = weights_of()

    def rows_in_packed():
        memory = torch.zeros(length + 3 * D)
        rows, packed = arrays_in(memory, (length - 1, length - 1 + 3 * D), (0, length))
        add(rows=rows.reshape(3, D), packed=packed)

    def last_row_in_sums():
        rows, sums = arrays_in(torch.zeros(4 * D), (0, 3 * D), (3 * D - 1, 4 * D - 1))
        add(rows=rows.reshape(3, D), sums=sums)

    def sums_in_packed():
        packed, sums = arrays_in(torch.zeros(length), (0, length), (length - D, length))
        add(packed=packed, sums=sums)

    return {
        "read-only": (lambda: add(packed=frozen(np.zeros(length, np.float32))), "read-only array"),
        "read-only sums": (lambda: add(sums=frozen(np.zeros(D, np.float32))), "read-only array"),
        "borrowed": (lambda: add(packed=same, sums=same[:D]), "one that is in use"),
        "borrowed rows": (
            lambda: add(rows=wide[None, :D], packed=wide[:length]), "one that is in use"),
        "rows in packed": (rows_in_packed, "packed .* of its own, got a view of rows"),
        "rows in sums": (last_row_in_sums, "sums .* of its own, got a view of rows"),
        "sums in packed": (sums_in_packed, "sums .* of its own, got a view of packed"),
        "misaligned rows": (lambda: add(rows=misaligned(np.ones((3, D), np.float32))), "alignment"),
        "misaligned double": (
            lambda: add(rows=misaligned(np.ones((3, D))), dtype="float64"), "alignment"),
        "misaligned half": (
            lambda: add(rows=misaligned(np.ones((3, D), np.uint16)), dtype="float16"), "alignment"),
        "misaligned packed": (
            lambda: add(packed=misaligned(np.zeros(length, np.float32))), "alignment"),
        "misaligned scores": (
            lambda: _core.kth_smallest([misaligned(scores)], 1), "scores must have the alignment"),
        "strided packed": (
            lambda: add(packed=np.zeros(2 * length, np.float32)[::2]), "contiguous elements"),
        "strided scores": (lambda: _core.kth_smallest([scores[::2]], 1), "contiguous elements"),
        "reversed rows": (lambda: add(rows=np.ones((3, D), np.float32)[::-1]), "other strides"),
        "type of rows": (lambda: add(rows=np.ones((3, D))), "float32 array.*got a float64 array"),
        "type of packed": (lambda: add(packed=np.zeros(length, int)), "got a int64 array"),
        "axes of packed": (lambda: add(packed=np.zeros((1, length), np.float32)), r"\[1, \d+\]"),
        "bytes of scores": (
            lambda: _core.kth_smallest([scores.astype(">f4")], 1), "got a byte-swapped"),
        "type of scores": (lambda: _core.kth_smallest([scores.astype(float)], 1), "got a float64"),
        "no array": (lambda: _core.kth_smallest([[1.0]], 1), "got list"),
        "type of a mask": (
            lambda: _core.inverse_diagonal([core_parameter(ODD)], B, 1.0), "bool array .*uint8"),
    }  # fmt: skip


@pytest.mark.parametrize("name", refused_arrays())
def test_arrays_that_cannot_be_used(name):
    call, message = refused_arrays()[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_neighbors_in_one_buffer_are_no_overlap():
    """Rows, blocks and sums that interleave in one buffer, without a shared element."""
    length = _core.packed_len(D, B)
    places = (0, 6 * D), (D, 2 * D), (6 * D, 6 * D + length)
    table, sums, packed = arrays_in(torch.zeros(length + 6 * D), *places)
    rows = table.reshape(3, 2 * D)[:, :D]
    rows[:] = 1
    _core.accumulate(rows, "float32", B, packed, sums)
    assert (sums == 3).all()
    assert (packed == 3).all()


def test_lists_have_an_item_for_each_parameter():
    two, one = [core_parameter(), core_parameter()], [weights_of()]
    mask, shape = np.ones(D, bool), (1, D, 1)
    for call in (
        lambda: _core.eliminate(two, one, B, 1.0),
        lambda: _core.eliminate(two[:1], 2 * one, B, 1.0),
        lambda: _core.compensate(two, one, [mask, mask], B, 1.0),
        lambda: _core.compensate(two, 2 * one, [mask], B, 1.0),
        lambda: _core.n_of_m_joint(two, 2 * one, [shape], B, 2, 4, 1.0),
        lambda: _core.group_costs(two, one, [shape, shape], B, 4, 1.0),
    ):
        with pytest.raises(ValueError, match="must have an item for each of the . parameters"):
            call()


def test_rows_without_elements():
    none = np.zeros(0, np.float32)
    for n in (0, 1, 5):
        _core.accumulate(np.zeros((n, 0), np.float32), "float32", B, none, none.copy())
        assert _core.dual_inverse_diagonal(
            np.zeros((n, 0), np.float32), "float32", B, 1.0, None, 1.0
        )[1] == []  # fmt: skip
    packed, sums = np.full(_core.packed_len(D, B), 7, np.float32), np.zeros(D, np.float32)
    for rows in (np.zeros((0, D), np.float32), np.zeros((0, 2 * D), np.float32)[:, ::2]):
        _core.accumulate(rows, "float32", B, packed, sums)
        assert (packed == 7).all()


def test_memory_that_is_not_there_is_an_error():
    # A row that is repeated without a copy: the Gram matrix of 2^28 rows has 2^55 entries.
    many = np.broadcast_to(np.ones((1, 4), np.float32), (2**28, 4))
    with pytest.raises(MemoryError, match="the Gram matrix of the rows must fit into memory"):
        _core.dual_inverse_diagonal(many, "float32", 4, 1.0, None, 1.0)
    with pytest.raises(ValueError, match="number of rows must be few enough"):
        _core.dual_inverse_diagonal(np.zeros((2**40, 0), np.float32), "float32", 4, 1.0, None, 1.0)
    for size in (2**33, 2**62):
        with pytest.raises(ValueError, match="block_size must be small enough"):
            _core.packed_len(2**62, size)


@pytest.mark.parametrize("pattern", ["1:200000000000", "99999999999:200000000000", "3:7"])
def test_groups_longer_than_a_row(pattern):
    scores = torch.rand(5, 6, 2, generator=torch.Generator().manual_seed(0))
    n, m = map(int, pattern.split(":"))
    kept = fastsal.rank({"w": scores}, pattern=pattern)["w"]
    stay = math.ceil(6 * n / m)
    want = scores >= scores.sort(1, descending=True).values[:, stay - 1 : stay]
    assert torch.equal(kept, want)


def test_whole_groups_longer_than_a_row():
    scores = {"w": torch.rand(5, 6, 2, generator=torch.Generator().manual_seed(0))}
    long, row = (fastsal.rank(scores, 0.5, pattern=p) for p in ("1x200000000000", "1x6"))
    assert torch.equal(long["w"], row["w"])
    assert long.sparsity == 0.5


@pytest.mark.parametrize("pattern", ["1:" + "9" * 30, "1x" + "9" * 30, "1:" + "9" * 5000])
def test_patterns_without_a_size(pattern):
    with pytest.raises(InvalidArgument, match="pattern must be 'N:M' with 0 < N <= M < 1e18"):
        fastsal.rank({"w": torch.rand(5, 6)}, 0.5, pattern=pattern)


@pytest.mark.parametrize("block_size", [10**6, 2**63 - 1, 10**30])
def test_blocks_larger_than_the_parameter(block_size, weights):
    gradients = torch.randn(200, 4, B, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (block_size, None):
        fisher = fastsal.BlockFisher({"w": (4, B)}, block_size=size)
        fisher.update({"w": gradients})
        model = Holder(weights)
        scores = fastsal.score(model, fisher, "obs-greedy", 1e-3)
        fastsal.compensate(model, fisher, fastsal.rank(scores, 0.5), 1e-3)
        found += [(scores["w"], model.w.detach(), fisher)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    with pytest.raises(MemoryError, match="block_size must leave room for blocks of 'w'"):
        found[0][2].blocks("w")


def test_headers_that_name_more_than_the_file_holds(tmp_path, fisher):
    """Nothing of the size that a header names is allocated before it is compared with the file."""
    import json

    from fastsal.fisher import files

    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    own = json.loads(header["__metadata__"]["fastsal"])
    own["shapes"]["w"] = [2**40, 2**20]
    header["__metadata__"]["fastsal"] = json.dumps(own)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(FileFormatError, match="'sums:w' must be"):
        files.read(path, verify=False)


LEAST = sys.float_info.min


@pytest.mark.parametrize("damping", [5e-324, 5.5e-309, LEAST * (1 - 2**-52), 0.0, -1.0, math.inf])
def test_dampings_without_an_inverse(damping, fisher, weights):
    parameter = core_parameter()
    for call in (
        lambda: _core.inverse_diagonal([parameter], B, damping),
        lambda: _core.eliminate([parameter], [weights_of()], B, damping),
        lambda: _core.dual_inverse_diagonal(
            np.ones((3, D), np.float32), "float32", B, 3.0, None, damping
        ),
        lambda: fastsal.score(Holder(weights), fisher, damping=damping),
        lambda: fisher.inverse_diagonals(damping),
    ):
        with pytest.raises(ValueError, match="^damping must be"):
            call()


def test_the_least_damping():
    """Statistics of no rank: the inverse is 1 / λ."""
    parameter = (np.zeros(_core.packed_len(D, B), np.float64), D, 1.0, None)
    values, failed, sensitivity = _core.inverse_diagonal([parameter], B, LEAST)[0]
    assert failed == []
    np.testing.assert_allclose(values, 1 / LEAST, rtol=1e-12)
    assert not sensitivity.any()
    zero = np.zeros((3, D), np.float32)
    values, failed, _ = _core.dual_inverse_diagonal(zero, "float32", B, 3.0, None, LEAST)
    np.testing.assert_allclose(values, 1 / LEAST, rtol=1e-12)
    assert failed == []


def test_samples_without_an_inverse():
    packed, d, *_ = core_parameter()
    for samples in (5e-324, 0.0, math.nan, -1.0):
        with pytest.raises(ValueError, match="^samples must be a finite number"):
            _core.diagonal((packed, d, samples, None), B)
    ones = np.ones((3, D), np.float32)
    for samples, damping in ((1e-200, 1e-200), (1e200, 1e200)):
        with pytest.raises(ValueError, match="^samples times damping must be a finite number"):
            _core.dual_inverse_diagonal(ones, "float32", B, samples, None, damping)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_must_be_finite(bad, fisher, weights):
    given = weights_of()
    given[200] = bad
    parameter, mask, shape = core_parameter(), np.ones(D, bool), (1, D, 1)
    for call in (
        lambda: _core.eliminate([parameter], [given], B, 1.0),
        lambda: _core.compensate([parameter], [given], [mask], B, 1.0),
        lambda: _core.n_of_m_joint([parameter], [given], [shape], B, 2, 4, 1.0),
        lambda: _core.group_costs([parameter], [given], [shape], B, 4, 1.0),
    ):
        with pytest.raises(ValueError, match="weights must be finite, got .* at position 200"):
            call()
    weights[3, 8] = bad
    masks = {"w": torch.rand(4, B) < 0.5}
    for call in (
        lambda m: fastsal.compensate(m, fisher, masks),
        lambda m: fastsal.rank_pattern(m, fisher, "2:4"),
        lambda m: fastsal.rank_pattern(m, fisher, "1x4", 0.5),
        lambda m: fastsal.score(m, fisher, "obs-greedy"),
    ):
        model = Holder(weights)
        with pytest.raises(InvalidArgument, match="^model: parameter 'w' has NaN or infinite"):
            call(model)
        assert torch.equal(model.w.detach(), weights) or math.isnan(bad)


def imported(isa, python_env, code="from fastsal import _core; print(_core.build_info()[1])"):
    """What a new process prints with `FASTSAL_ISA`."""
    environment = {**python_env, "FASTSAL_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


def test_instruction_sets(python_env):
    available = _core.instruction_sets()
    assert available[0] == "portable"
    names = {"portable": ("portable", "neon"), "avx2": ("avx2+fma",), "avx512": ("avx512f",)}
    for isa in available:
        assert imported(isa, python_env).stdout.strip() in names[isa]
    assert imported("", python_env).stdout.strip() in names[available[-1]]
    missing = [isa for isa in names if isa not in available]
    for isa in ["sse9", "AVX2", *missing]:
        done = imported(isa, python_env)
        assert done.returncode != 0
        assert done.stderr.splitlines()[-1] == (
            "ImportError: FASTSAL_ISA must be an instruction set of this processor "
            f'({", ".join(available)}), got "{isa}"'
        )


def test_the_command_names_a_wrong_instruction_set(python_env, tmp_path):
    code = f"from fastsal.cli import main; main(['bench', '--out', {str(tmp_path / 'x')!r}])"
    done = imported("sse9", python_env, code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: FASTSAL_ISA must be an instruction set")
    assert len(done.stderr.splitlines()) == 1
