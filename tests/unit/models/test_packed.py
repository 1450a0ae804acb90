"""Packed files: every bit is read back, damage is told, and the reader of the docs reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.packed import METADATA, pack, unpack
from fastsal.models.saving import save_packed
from fastsal.models.weights import load_weights, read_weights

ROOT = Path(__file__).resolve().parents[3]


# Types in which PyTorch does not index, compare or compute.
KINDS = (
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu,
)  # fmt: skip


def of_type(kind):
    size = torch.empty(0, dtype=kind).element_size()
    raw = torch.zeros(256 * size, dtype=torch.uint8)
    raw[::40] = torch.arange(len(raw[::40]), dtype=torch.uint8) + 1
    return raw.view(kind).view(16, 16)


def state():
    draw = torch.Generator().manual_seed(0)
    gone = torch.rand(40, 30, generator=draw) < 0.9
    sparse = torch.randn(40, 30, generator=draw).masked_fill_(gone, 0)
    odd = torch.zeros(7, 11)
    odd[2, 3], odd[6, 10], odd[0, 0] = -0.0, float("nan"), float("inf")
    return {
        "a.weight": sparse,
        "a.half": sparse.half(),
        "a.bfloat": sparse.bfloat16(),
        "a.double": sparse.double(),
        "odd": odd,
        "dense": torch.randn(5, 5, generator=draw),
        "zeros": torch.zeros(64, 3),
        "scalar": torch.tensor(0),
        "count": torch.tensor([0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        "flags": torch.zeros(100, dtype=torch.bool),
        "empty": torch.zeros(0, 4),
        **{f"a.{kind}": of_type(kind) for kind in KINDS},
    }


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        if tensor.numel():
            assert torch.equal(bits(found[name]), bits(tensor)), name


def test_every_bit_is_read_back(tmp_path):
    tensors, metadata = pack(state())
    assert_same(unpack(tensors, metadata, "x"), state())
    assert "mask:a.weight" in tensors
    assert "dense" in tensors
    save_file(tensors, tmp_path / "p.safetensors", metadata)
    assert_same(read_weights(tmp_path / "p.safetensors"), state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tenth_of_the_weights_takes_at_most_a_seventh_of_the_bytes(dtype):
    draw = torch.Generator().manual_seed(0)
    gone = torch.rand(500, 400, generator=draw) < 0.9
    w = torch.randn(500, 400, generator=draw).masked_fill_(gone, 0).to(dtype)
    tensors, _ = pack({"w": w})
    assert sum(t.nbytes for t in tensors.values()) <= 0.15 * w.nbytes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)
        self.second.weight = self.first.weight  # tied
        self.norm = nn.BatchNorm1d(20)


def test_a_model_is_loaded_from_a_packed_file(tmp_path):
    torch.manual_seed(0)
    model, path = Net(), tmp_path / "packed.safetensors"
    with torch.no_grad():
        model.first.weight.mul_(torch.rand(20, 20) < 0.1)
    save_packed(model, path)
    other = Net()
    load_weights(other, path)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    save_packed(model, path, torch.float16)
    load_weights(other, path)
    assert torch.equal(other.first.weight, model.first.weight.half().float())


def test_values_that_a_type_cannot_hold_are_an_error(tmp_path):
    model, path = Net(), tmp_path / "packed.safetensors"
    model.norm.running_var[3] = 2e5
    with pytest.raises(
        InvalidArgument,
        match=r"dtype must .* hold 'norm.running_var', .* up to 2e\+05, got float16",
    ):
        save_packed(model, path, torch.float16)
    assert not list(tmp_path.iterdir())
    save_packed(model, path, torch.bfloat16)
    model.norm.running_var[3] = torch.inf
    save_packed(model, path, torch.float16)
    assert read_weights(path)["norm.running_var"][3] == torch.inf


def test_the_reader_of_the_docs(tmp_path):
    page = (ROOT / "docs" / "structured.md").read_text(encoding="utf-8")
    (code,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "read_packed" in b)
    assert "fastsal" not in code.replace("fastsal.packed", "")
    assert len(code.splitlines()) <= 30
    tensors, metadata = pack(state())
    save_file(tensors, tmp_path / "p.safetensors", metadata)
    space = {}
    exec(code, space)
    assert_same(space["read_packed"](tmp_path / "p.safetensors"), state())


@pytest.mark.parametrize(
    "change",
    [
        {METADATA: "{"},
        {METADATA: json.dumps({"version": 2, "tensors": {}})},
        {METADATA: json.dumps({"version": 1, "tensors": {"nothing": [2]}})},
        {METADATA: json.dumps({"version": 1, "tensors": {"a.weight": [40, 31]}})},
        {METADATA: json.dumps({"version": 1, "tensors": {"a.weight": [40, -30]}})},
        {METADATA: json.dumps({"version": 1, "tensors": {"a.weight": [1 << 40]}})},
        {METADATA: json.dumps([1])},
    ],
)
def test_damage_is_told(tmp_path, change):
    tensors, _ = pack({"a.weight": state()["a.weight"]})
    save_file(tensors, tmp_path / "p.safetensors", change)
    with pytest.raises(FileFormatError, match="packed file"):
        read_weights(tmp_path / "p.safetensors")


def test_a_mask_with_other_values_is_told(tmp_path):
    tensors, metadata = pack({"a.weight": state()["a.weight"]})
    tensors["values:a.weight"] = tensors["values:a.weight"][:-1].clone()
    save_file(tensors, tmp_path / "p.safetensors", metadata)
    with pytest.raises(FileFormatError, match="another number of elements"):
        read_weights(tmp_path / "p.safetensors")
    tensors["mask:a.weight"] = tensors["mask:a.weight"][3:].clone()
    save_file(tensors, tmp_path / "p.safetensors", metadata)
    with pytest.raises(FileFormatError, match="damaged packed file"):
        read_weights(tmp_path / "p.safetensors")


def test_names_that_a_file_cannot_have():
    with pytest.raises(InvalidArgument, match="must not begin with"):
        pack({"mask:x": torch.zeros(3)})


def test_plain_files_are_read_as_before(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert torch.equal(read_weights(tmp_path / "w.safetensors")["w"], torch.ones(2))
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() is None
    assert load_file(tmp_path / "w.safetensors").keys() == {"w"}
