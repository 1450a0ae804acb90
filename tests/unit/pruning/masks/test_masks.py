"""Masks: applied, proven, stored, and refused where they do not belong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from fastsal import BlockFisher, Masks, rank
from fastsal.errors import FileFormatError, InvalidArgument, MaskError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 7))


def random_masks(model=None, recipe=None):
    generator = torch.Generator().manual_seed(1)
    owned = dict((model or net()).named_parameters())
    names = ["2.weight", "0.weight"]  # an order of their own
    return Masks({n: torch.rand(owned[n].shape, generator=generator) < 0.4 for n in names}, recipe)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mapping():
    masks = random_masks(recipe={"sparsity": 0.6})
    assert list(masks) == ["2.weight", "0.weight"]
    assert len(masks) == 2
    assert "0.weight" in masks
    assert "0.bias" not in masks
    assert masks["0.weight"].dtype == torch.bool
    assert masks.shapes == {"2.weight": (7, 5), "0.weight": (5, 3, 3, 3)}
    kept = {name: int(m.sum()) for name, m in masks.items()}
    assert masks.kept == kept
    assert masks.total == 35 + 135
    assert masks.sparsity == 1 - sum(kept.values()) / 170
    assert f"{sum(kept.values())} of 170 weights kept" in repr(masks)
    assert masks.recipe == {"sparsity": 0.6}
    with pytest.raises(KeyError):
        masks["none"]


def test_equality():
    masks = random_masks()
    assert masks == random_masks(recipe={"another": "recipe"})
    other = {name: m.clone() for name, m in masks.items()}
    other["2.weight"][0, 0] ^= True
    assert masks != Masks(other)
    assert masks != Masks({"2.weight": masks["2.weight"]})
    assert masks != Masks({n: m.reshape(-1) for n, m in masks.items()})
    assert masks != dict(masks)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64, torch.bfloat16])
def test_other_types(dtype):
    masks = random_masks()
    assert Masks({n: m.to(dtype) * 3 for n, m in masks.items()}) == masks


@pytest.mark.parametrize("masks", [{}, {"a": torch.ones(3), "b": torch.ones(0, 3)}])
def test_empty(masks):
    with pytest.raises(InvalidArgument, match="^masks must (hold at least one|not be empty)"):
        Masks(masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_apply_and_verify(dtype):
    model, masks = net().to(dtype), random_masks()
    before = state(model)
    with pytest.raises(MaskError, match="pruned weights of '2.weight' are not zero, the first at"):
        masks.verify(model)
    assert_same(model, before)
    masks.apply(model)
    masks.verify(model)
    for name, value in model.state_dict().items():
        want = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(value, want)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_verify_counts_and_finds():
    model, masks = net(), Masks({"2.weight": torch.ones(7, 5)})
    mask = torch.ones(7, 5, dtype=torch.bool)
    mask[1] = False
    masks = Masks({"2.weight": mask})
    masks.apply(model)
    with torch.no_grad():
        model[2].weight[1, 2] = -0.0
    masks.verify(model)
    with torch.no_grad():
        model[2].weight[1, 3] = math.nan
        model[2].weight[1, 4] = 1e-45
    with pytest.raises(MaskError, match=r"2 pruned weights of '2.weight'.*first at \[1, 3\]"):
        masks.verify(model)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_pruned_weights_that_are_not_finite_become_zero(value):
    model, masks = net(), random_masks()
    with torch.no_grad():
        model[2].weight.fill_(value)
    masks.apply(model)
    masks.verify(model)
    weight = model[2].weight.detach()
    assert (weight[~masks["2.weight"]] == 0).all()
    assert not torch.isfinite(weight[masks["2.weight"]]).any()


def test_channels_last():
    model, masks = net().to(memory_format=torch.channels_last), random_masks()
    want = net()
    masks.apply(want)
    masks.apply(model)
    assert_same(model, state(want))


def test_shared_parameters_by_either_name():
    model = nn.Module()
    model.a, model.b = nn.Linear(4, 4), nn.Linear(4, 4)
    model.b.weight = model.a.weight
    Masks({"b.weight": torch.zeros(4, 4)}).apply(model)
    assert not model.a.weight.any()


@pytest.mark.parametrize("call", ["apply", "verify"])
@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"0.weight": torch.zeros(5, 3, 3, 3), "3.weight": torch.ones(2)},
            "no parameter '3.weight'",
        ),
        (
            {"0.weight": torch.zeros(5, 3, 3, 3), "2.weight": torch.ones(35)},
            r"'2.weight' of shape",
        ),
        ({"0.weight": torch.zeros(5, 3, 3, 3), "2.weight": torch.ones(5, 7)}, r"\(7, 5\)"),
        ({"0.weight": torch.zeros(5, 3, 3, 3), "1.running_mean": torch.ones(5)}, "no parameter"),
    ],
)
def test_masks_of_another_model(masks, message, call):
    model = net()
    before = state(model)
    with pytest.raises(MaskError, match=f"^model has .*{message}.*another model"):
        getattr(Masks(masks), call)(model)
    assert_same(model, before)


# Files.

RECIPE = {
    "criterion": "obs-greedy",
    "sparsity": 0.7,
    "threshold": -math.inf,
    "damping": [1e-5, None],
    "nested": {"é": "\n\"'", "list": [1, 2]},
}


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 1001])
def test_save_and_load_of_all_sizes(tmp_path, size):
    masks = Masks({"w": torch.rand(size) < 0.5, "none": torch.zeros(size), "all": torch.ones(size)})
    masks.save(tmp_path / "m")
    assert Masks.load(tmp_path / "m") == masks


def test_save_and_load(tmp_path):
    masks = random_masks(recipe=RECIPE)
    path = tmp_path / "folder" / "masks.safetensors"
    masks.save(path, {"seed": 3})
    assert masks.recipe == RECIPE
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = Masks.load(path)
    assert loaded == masks
    assert list(loaded) == list(masks)
    assert loaded.recipe == {**RECIPE, "seed": 3}
    loaded.save(str(path))  # over itself
    assert Masks.load(str(path)).recipe == {**RECIPE, "seed": 3}


def test_masks_are_packed(tmp_path):
    masks = Masks({"w": torch.ones(1000, 1000)})
    masks.save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 1000 * 1000 / 8 + 1000


def test_recipes_of_ranking_survive(tmp_path):
    masks = rank({"w": torch.rand(40)}, 0.3)
    masks.save(tmp_path / "m")
    assert Masks.load(tmp_path / "m").recipe == masks.recipe


def test_recipes_are_what_json_makes_of_them(tmp_path):
    Masks({"w": torch.ones(3)}, {2: "b", 10: ("a", 1)}).save(tmp_path / "m")
    assert Masks.load(tmp_path / "m").recipe == {"2": "b", "10": ["a", 1]}


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "m"
    masks = random_masks()
    masks.save(path)
    with pytest.raises(TypeError):
        masks.save(path, {"not for JSON": object()})
    assert Masks.load(path) == masks
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be an existing file"):
        Masks.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="path must be an existing file"):
        Masks.load(tmp_path)


def test_load_truncated(tmp_path):
    path = tmp_path / "m"
    random_masks(recipe=RECIPE).save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="^path(:| must be a masks file) "):
            Masks.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileFormatError, match="^path(:| must be a masks file) "):
        Masks.load(path)


def test_load_flipped_bits(tmp_path, read_flipped):
    path = tmp_path / "m"
    masks = random_masks(recipe={"sparsity": 0.7})
    masks.save(path)
    size = path.stat().st_size
    flips = [(at, bit) for at in range(size) for bit in (range(8) if at < 8 else {at % 8, 5})]
    for _, loaded in read_flipped(path, Masks.load, flips):
        assert loaded == masks
        assert loaded.recipe == masks.recipe


def test_load_foreign_files(tmp_path):
    path = tmp_path / "m"
    masks = random_masks(recipe=RECIPE)
    masks.save(path)
    bits = load_file(path)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["fastsal"])
    save_file(bits, path, metadata={"fastsal": json.dumps(header)})
    assert Masks.load(path) == masks

    shapes = header["shapes"]
    wrong = {
        "none": None,
        "no header": {},
        "list": {"fastsal": "[]"},
        "not JSON": {"fastsal": "{"},
        "version": {"fastsal": json.dumps({**header, "version": 2})},
        "format": {"fastsal": json.dumps({**header, "format": "other"})},
        "recipe": {"fastsal": json.dumps({**header, "recipe": {}})},
        "no digest": {"fastsal": json.dumps({k: v for k, v in header.items() if k != "digest"})},
        "shapes": {"fastsal": json.dumps({**header, "shapes": {**shapes, "2.weight": [5, 7]}})},
        "one missing": {"fastsal": json.dumps({**header, "shapes": {"2.weight": [7, 5]}})},
        "one more": {"fastsal": json.dumps({**header, "shapes": {**shapes, "x": [3]}})},
        "no shapes": {"fastsal": json.dumps({**header, "shapes": []})},
    }
    for metadata in wrong.values():
        save_file(bits, path, metadata=metadata)
        with pytest.raises(FileFormatError, match="^path(:| must be a masks file) "):
            Masks.load(path)
    BlockFisher({"w": (3,)}).save(path)
    with pytest.raises(FileFormatError, match="must be a masks file of version 1"):
        Masks.load(path)
    for content in (b"", b"not a safetensors file", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="^path(:| must be a masks file) "):
            Masks.load(path)


def test_masks_do_not_change_with_what_they_were_made_of():
    kept, limits = torch.ones(2, 3, dtype=torch.bool), [0.1]
    masks = Masks({"w": kept}, {"limits": limits})
    kept[0] = False
    limits.append(0.2)
    assert bool(masks["w"].all())
    assert masks.recipe == {"limits": [0.1]}
    shared = Masks({"w": kept}, copy=False)
    assert shared["w"].data_ptr() == kept.data_ptr()


def test_recipes_of_numbers_of_libraries_are_saved(tmp_path):
    recipe = {"damping": np.float32(0.5), "rounds": torch.tensor(2), "at": (1, -math.inf)}
    Masks({"w": torch.ones(3)}, recipe).save(tmp_path / "m.safetensors")
    found = Masks.load(tmp_path / "m.safetensors").recipe
    assert found == {"damping": 0.5, "rounds": 2, "at": [1, -math.inf]}
