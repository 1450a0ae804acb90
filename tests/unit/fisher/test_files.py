"""Statistics in files: in shards, in bfloat16, worked on where they lie, merged without loading."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal import BlockFisher
from fastsal.errors import FactorizationError, FileFormatError, InvalidArgument
from fastsal.fisher.block_fisher import sums_of

SHAPES = {"0.weight": (40, 30), "2.weight": (20, 40), "4.weight": (10, 20)}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(30, 40, bias=False),
        nn.ReLU(),
        nn.Linear(40, 20, bias=False),
        nn.ReLU(),
        nn.Linear(20, 10, bias=False),
    )


def statistics(seed=0, samples=80, block_size=64):
    generator = torch.Generator().manual_seed(seed)
    fisher = BlockFisher(SHAPES, block_size=block_size)
    fisher.update(
        {n: torch.randn(samples, *shape, generator=generator) for n, shape in SHAPES.items()}
    )
    return fisher


def assert_same(a, b):
    assert (a.samples, a.shapes, a.block_size) == (b.samples, b.shapes, b.block_size)
    for name in a.names:
        assert torch.equal(a.blocks(name), b.blocks(name))
        assert torch.equal(a.mean_gradient()[name], b.mean_gradient()[name])


@pytest.mark.parametrize("samples", [5, 80])
def test_shards_and_their_index(tmp_path, samples):
    fisher = statistics(samples=samples)
    fisher.save(tmp_path / "fisher.json", shard_bytes="100KiB")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [*(f"fisher-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "fisher.json"]
    assert_same(BlockFisher.load(tmp_path / "fisher.json"), fisher)
    # A shard is a file of its own.
    assert BlockFisher.load(tmp_path / names[0]).names == ["0.weight"]


def test_a_loaded_file_is_read_as_it_is_used(tmp_path):
    fisher = statistics()
    fisher.save(tmp_path / "f")
    loaded = BlockFisher.load(tmp_path / "f", verify=False)
    assert not sums_of(loaded).parameters["0.weight"].packed.flags.writeable
    models = net(), net()
    masks = None
    for model, some in zip(models, (fisher, loaded), strict=True):
        sums_of(some).storage.view_bytes = 2**14
        scores = fastsal.score(model, some, "obs-greedy", damping=1e-2)
        new = fastsal.rank(scores, 0.5)
        assert masks is None or masks == new
        masks = new
        fastsal.compensate(model, some, masks, damping=1e-2)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    # What changes is read into memory; the file stays.
    loaded.decay(0.5)
    fisher.decay(0.5)
    loaded.merge(statistics(1))
    fisher.merge(statistics(1))
    assert_same(loaded, fisher)
    assert BlockFisher.load(tmp_path / "f").samples == 80


@pytest.mark.parametrize("samples", [5, 80])
def test_bfloat16_on_disk(tmp_path, samples):
    fisher = statistics(samples=samples)
    fisher.save(tmp_path / "whole")
    fisher.save(tmp_path / "half", dtype="bfloat16")
    loaded = BlockFisher.load(tmp_path / "half")
    if samples == 80:
        sizes = [(tmp_path / n).stat().st_size for n in ("half", "whole")]
        assert sizes[0] < 0.55 * sizes[1]
    for name in fisher.names:
        a, b = loaded.blocks(name), fisher.blocks(name)
        assert float(((a - b).abs() / b.abs().clamp(min=1e-30)).max()) <= 2.0**-8
        assert torch.equal(loaded.mean_gradient()[name], fisher.mean_gradient()[name])
    if samples == 80:  # rows, of few samples, are kept as they are
        told = loaded.inverse_diagonals(1.0)["0.weight"]
        true = fisher.inverse_diagonals(1.0)["0.weight"]
        assert (abs(told.values / true.values - 1) <= np.repeat(told.errors, 64)[:1200]).all()
        assert told.errors.max() > 100 * true.errors.max()
        loaded.save(tmp_path / "again", dtype="float32")
        again = BlockFisher.load(tmp_path / "again").inverse_diagonals(1.0)["0.weight"]
        assert again.errors.max() > 100 * true.errors.max()  # what was lost stays lost


def test_the_bound_of_bfloat16_is_half_a_unit_of_its_eight_bits(tmp_path):
    """`2 F = 1 + 2⁻⁸` lies halfway between two numbers, and loses 2⁻⁸ of its value."""
    fisher = BlockFisher({"w": (1,)}, block_size=1)
    fisher.update({"w": torch.tensor([[1.0], [2.0**-4]])})
    fisher.save(tmp_path / "half", dtype="bfloat16")
    loaded = BlockFisher.load(tmp_path / "half")
    true = fisher.inverse_diagonals(1e-6)["w"].values
    told = loaded.inverse_diagonals(1e-6)["w"]
    lost = abs(told.values / true - 1)
    assert lost > 2.0**-9
    assert (lost <= told.errors).all()


def test_bfloat16_needs_more_damping(tmp_path):
    torch.manual_seed(0)
    fisher = BlockFisher({"w": (64,)}, block_size=64)
    fisher.update({"w": torch.randn(100, 1) @ torch.randn(1, 64)})  # of rank one
    fisher.save(tmp_path / "half", dtype="bfloat16")
    loaded = BlockFisher.load(tmp_path / "half")
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(64))
    fastsal.score(model, fisher, damping=1e-1)
    with pytest.raises(FactorizationError, match="λ = 0.001"):
        fastsal.score(model, loaded, damping=1e-3)


@pytest.mark.parametrize("block_size", [64, 512])
@pytest.mark.parametrize("samples", [5, 80])
def test_files_are_merged_without_loading(tmp_path, samples, block_size):
    parts = [statistics(seed, samples, block_size) for seed in range(3)]
    for i, part in enumerate(parts):
        part.save(tmp_path / f"f{i}", shard_bytes="100KiB" if i == 1 else None)
    paths = [tmp_path / f"f{i}" for i in range(3)]
    fastsal.merge_files(paths, tmp_path / "sum", weights=[1, 0.5, 2], shard_bytes="1MiB")
    expected = parts[0]
    expected.merge(parts[1], 0.5)
    expected.merge(parts[2], 2)
    found = BlockFisher.load(tmp_path / "sum")
    assert found.samples == expected.samples
    for name in SHAPES:
        torch.testing.assert_close(found.blocks(name), expected.blocks(name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index, folder: index["shards"].pop(), "do not hold the parameters"),
        (lambda index, folder: index["shards"].append("none.safetensors"), "lists the shard none"),
        (lambda index, folder: index.update(format="other"), "is not an index"),
        (
            lambda index, folder: index["shards"].append(index["shards"][0]),
            "duplicated in several shards",
        ),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, change, message):
    statistics().save(tmp_path / "f", shard_bytes="128KiB")
    index = json.loads((tmp_path / "f").read_text())
    change(index, tmp_path)
    (tmp_path / "f").write_text(json.dumps(index, indent=1))
    with pytest.raises(FileFormatError, match=message):
        BlockFisher.load(tmp_path / "f")


def test_shards_of_other_statistics(tmp_path):
    statistics().save(tmp_path / "f", shard_bytes="128KiB")
    name = json.loads((tmp_path / "f").read_text())["shards"][0]
    statistics(samples=70).save(tmp_path / "g", shard_bytes="128KiB")
    other = json.loads((tmp_path / "g").read_text())["shards"][0]
    (tmp_path / name).write_bytes((tmp_path / other).read_bytes())
    with pytest.raises(FileFormatError, match="of different statistics"):
        BlockFisher.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "float16"}, "dtype must be None, 'float32' or 'bfloat16', got 'float16'"),
        ({"shard_bytes": 0}, "shard_bytes must be a positive number of bytes.*got 0"),
    ],
)
def test_arguments_that_are_not_taken(tmp_path, how, message):
    with pytest.raises(InvalidArgument, match=message):
        statistics().save(tmp_path / "f", **how)
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_fit_together(tmp_path):
    statistics().save(tmp_path / "a")
    statistics(block_size=32).save(tmp_path / "b")
    with pytest.raises(InvalidArgument, match="other must have the same parameters"):
        fastsal.merge_files([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(
        InvalidArgument, match="weights must be one for each file, .*got 1 for 2 files"
    ):
        fastsal.merge_files([tmp_path / "a", tmp_path / "a"], tmp_path / "c", weights=[1])
    with pytest.raises(InvalidArgument, match="weight must be .*, got -1"):
        fastsal.merge_files([tmp_path / "a", tmp_path / "a"], tmp_path / "c", weights=[1, -1])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["/{0}", "../{0}", "../f/{0}", "sub/../{0}", "..", "", 3])
def test_shards_are_files_of_the_folder_of_their_index(name, tmp_path):
    """An index that was downloaded must not read other files of the machine."""
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    statistics().save(folder / "fisher.json", shard_bytes="100KiB")
    index = json.loads((folder / "fisher.json").read_text())
    outside = tmp_path / index["shards"][0]
    outside.write_bytes((folder / index["shards"][0]).read_bytes())
    if isinstance(name, str):
        name = name.format(str(outside)[1:] if name.startswith("/") else outside.name)
    index["shards"][0] = name
    (folder / "fisher.json").write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match="^path: .* must list shards in its own folder, got"):
        BlockFisher.load(folder / "fisher.json")
