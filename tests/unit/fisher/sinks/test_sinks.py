"""Every way from rows to statistics ends in the same sums."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import NonFiniteGradient
from fastsal.fisher.block_fisher import sums_of
from fastsal.fisher.parts import Part, by_key, uncut
from fastsal.fisher.sinks.choosing import choose_sink
from fastsal.fisher.sinks.gathering import RowGatherer, step_rows
from fastsal.fisher.sinks.slicing import PartSink
from fastsal.fisher.sinks.streaming import RowStream
from fastsal.fisher.sinks.tiles import DeviceTiles, tile_bytes
from fastsal.gradients import GradientEngine, per_sample_gradients, select_parameters

CPU = torch.device("cpu")


class Net(nn.Module):
    """A convolution, a weight used twice, one that only torch.func can serve, a short block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.twice = nn.Linear(20, 20)
        self.odd = nn.Parameter(torch.randn(20) * 0.1)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        x = self.conv(x).flatten(1)[:, :20]
        x = self.twice(torch.tanh(self.twice(x)))
        return self.head(x * self.odd)


@pytest.fixture
def data():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(45, 3, 6, 6), torch.randint(0, 4, (45,))


NAMES = ["conv.weight", "twice.weight", "odd", "head.weight"]


def collect(model, x, y, make, block_size=16):
    """Statistics through one sink, in micro-batches of 4."""
    chosen = select_parameters(model, NAMES)
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    fisher = fastsal.BlockFisher(shapes, block_size=block_size)
    sink = make(sums_of(fisher), chosen)
    with GradientEngine(model, chosen, micro_batch=4) as engine:
        for start in range(0, len(x), 4):
            part = slice(start, start + 4)
            engine.run(x[part], y[part], sink)
            sink.end_micro_batch(len(x[part]))
    sink.flush()
    return fisher


def gather(step, expected=None):
    def make(sums, parameters):
        dtypes = {name: p.dtype for name, p in parameters.items()}
        return RowGatherer(sums, dtypes, step, expected=expected)

    return make


def halves(sums, parameters):
    """Statistics of two parts of each parameter, added to those of the whole."""
    parts = {}
    for part in uncut(sums.shapes):
        cut = part.size // 2 // 16 * 16
        for a, b in [(0, cut), (cut, part.size)] if cut else [(0, part.size)]:
            piece = Part(part.name, a, b, part.size)
            parts[piece.key] = piece
    some = sums.like(by_key(list(parts.values())))
    sink = PartSink(gather(8)(some, {key: parameters[p.name] for key, p in parts.items()}), parts)
    flush = sink.flush

    def finish():
        flush()
        sums.merge_parts(some, parts)
        sums.count_parts(some)

    sink.flush = finish
    return sink


SINKS = {
    "gather": gather(8),
    "gather, 45 expected": gather(12, expected=45),
    "at once": gather(4),
    "tiles": lambda sums, p: DeviceTiles(sums, CPU),
    "stream": lambda sums, p: RowStream(sums, CPU),
}


@pytest.mark.parametrize(
    ("sink", "block_size"),
    [*((sink, size) for sink in SINKS for size in (16, 64, None)), ("parts", 16)],
)
def test_sums_equal_dense_products(data, sink, block_size):
    model, x, y = data
    fisher = collect(model, x, y, SINKS.get(sink, halves), block_size)
    rows = per_sample_gradients(model.double(), x.double(), y, parameters=NAMES)
    assert fisher.samples == 45
    means = fisher.mean_gradient()
    for name in NAMES:
        g = rows[name].flatten(1)
        size = min(block_size or g.shape[1], g.shape[1])
        g = nn.functional.pad(g, (0, -g.shape[1] % size)).view(45, -1, size)
        expected = torch.einsum("nki,nkj->kij", g, g) / 45
        found = fisher.blocks(name)[:, :size, :size]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        torch.testing.assert_close(means[name], rows[name].mean(0), rtol=1e-4, atol=1e-6)


def test_gathering_saves_passes(data):
    model, x, y = data
    held = []

    def make(sums, parameters):
        sink = gather(12, expected=45)(sums, parameters)
        add = sums.add

        def count(name, rows, expected):
            held.append((name, len(rows)))
            add(name, rows, expected)

        sums.add = count
        return sink

    collect(model, x, y, make, block_size=64)
    sizes = [n for name, n in held if name == "conv.weight"]
    assert sum(sizes) == 45
    assert sizes == [12, 12, 12, 9]


def test_steps_go_by_the_model_alone():
    layer = {"weight": nn.Linear(100, 100).weight}
    statistics = fastsal.BlockFisher({"weight": (100, 100)}, block_size=64).final_nbytes
    assert step_rows(layer, statistics, 4) == 24  # three quarters of the statistics
    assert step_rows(layer, statistics, 16) == 16
    assert step_rows(layer, statistics, 64) == 64
    assert step_rows(layer, statistics, 4, expected=10) == 8
    assert step_rows(layer, 100 * 2**30, 8) == 32


def test_bfloat16_stream_is_close(data):
    model, x, y = data
    exact = collect(model, x, y, SINKS["stream"])
    rounded = collect(model, x, y, lambda f, p: RowStream(f, CPU, dtype=torch.bfloat16))
    for name in NAMES:
        a, b = exact.blocks(name), rounded.blocks(name)
        assert 0 < float((a - b).norm() / a.norm()) < 2**-8


@pytest.mark.parametrize("sink", SINKS)
def test_infinite_gradients_are_refused(sink):
    fisher = fastsal.BlockFisher({"w": (10,)}, block_size=4)
    w = nn.Parameter(torch.zeros(10))
    taker = SINKS[sink](sums_of(fisher), {"w": w})
    rows = torch.zeros(4, 10)
    rows[2, 7] = math.inf
    with pytest.raises(NonFiniteGradient, match="gradients must be finite, got .*inf.* for 'w'"):  # noqa: PT012
        for _ in range(9):
            taker("w", rows)
            taker.end_micro_batch(4)


def test_tile_bytes_are_those_of_the_tensors(data):
    model, x, y = data
    held = []

    def make(sums, parameters):
        sink = DeviceTiles(sums, CPU)
        flush = sink.flush

        def measured():
            held.append(sum(s.squares.nbytes + s.total.nbytes for s in sink.tiles.values()))
            flush()

        sink.flush = measured
        return sink

    fisher = collect(model, x, y, make)
    assert held == [tile_bytes(sums_of(fisher))]


@pytest.mark.parametrize(("free", "kind"), [(2**30, DeviceTiles), (100, RowStream)])
def test_choice_on_cuda_is_by_free_memory(monkeypatch, free, kind):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**33))
    fisher = fastsal.BlockFisher({"w": (100,)}, block_size=10)
    somewhere = {"w": SimpleNamespace(device=torch.device("cuda"))}
    assert type(choose_sink(sums_of(fisher), somewhere, by_key(uncut(fisher.shapes)), 4)) is kind
    on_cpu = {"w": nn.Parameter(torch.zeros(100))}
    assert (
        type(choose_sink(sums_of(fisher), on_cpu, by_key(uncut(fisher.shapes)), 4)) is RowGatherer
    )


def test_float64_sums_are_never_tiles(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    fisher = fastsal.BlockFisher({"w": (100,)}, block_size=10, precision="float64")
    somewhere = {"w": SimpleNamespace(device=torch.device("cuda"))}
    assert (
        type(choose_sink(sums_of(fisher), somewhere, by_key(uncut(fisher.shapes)), 4)) is RowStream
    )


def test_sums_of_a_device_become_those_of_the_core_without_a_copy():
    sums = sums_of(fastsal.BlockFisher({"w": (100,)}, block_size=16))
    packed = np.ones(len(sums.parameters["w"].fold()), np.float32)
    sums.parameters["w"].clear()
    sums.parameters["w"].add_sums(packed, np.ones(100, np.float32))
    assert sums.parameters["w"].packed is packed
    sums.parameters["w"].add_sums(np.full_like(packed, 2), np.ones(100, np.float32))
    assert (sums.parameters["w"].packed == 3).all()
    assert (sums.parameters["w"].sums == 2).all()


def test_tiles_add_to_sums_that_are_there(data):
    model, x, y = data
    both = collect(model, x, y, SINKS["tiles"])
    again = collect(model, x, y, SINKS["tiles"])
    both.merge(again)
    rows = per_sample_gradients(model, x, y, parameters=NAMES)
    fisher = fastsal.BlockFisher({n: tuple(v.shape[1:]) for n, v in rows.items()}, block_size=16)
    fisher.update(rows)
    sink = DeviceTiles(sums_of(fisher), CPU)
    for name, values in rows.items():
        sink(name, values)
    sink.end_micro_batch(len(x))
    sink.flush()
    for name in NAMES:
        found, expected = fisher.blocks(name), both.blocks(name)
        atol = 1e-5 * float(expected.max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)
