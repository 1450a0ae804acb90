"""Arrays in a scratch file keep their values when their memory is given back."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from fastsal.errors import InvalidArgument
from fastsal.pruning.shelf import Shelf
from fastsal.utils.mapped_files import FileArrays
from fastsal.utils.sizes import gib


def test_values_survive_a_release(tmp_path):
    arrays = FileArrays(tmp_path, 1 << 20)
    a, b = arrays.take((100, 7), np.float32), arrays.take((5,), np.float64)
    assert not a.any()
    a[:], b[:] = 3, 4
    arrays.release()
    assert (a == 3).all()
    assert (b == 4).all()
    a += 1
    arrays.release()
    assert (a == 4).all()


def test_nothing_is_left_in_the_folder(tmp_path):
    arrays = FileArrays(tmp_path, 1 << 20)
    assert os.listdir(tmp_path) == []
    assert arrays.nbytes >= 1 << 20


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 99, 1))
    with pytest.raises(
        InvalidArgument, match="scratch must have 1.0 GiB of free disk space, got 0 KiB"
    ):
        FileArrays(tmp_path, 1 << 30)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(InvalidArgument, match="scratch must be an existing folder"):
        FileArrays(tmp_path / "none", 1)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_shelf_keeps_copies(tmp_path, on_disk):
    shelf = Shelf(tmp_path if on_disk else None)
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).double(), "c": torch.ones(2).bfloat16()}
    kept = shelf.put("weights", tensors)
    expected = {name: t.clone() for name, t in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    shelf.release()
    for name, tensor in expected.items():
        assert torch.equal(kept[name], tensor)
    again = shelf.put("weights", tensors)
    assert all(not t.any() for t in again.values())
    room = shelf.room("moved", {"a": (3, 4)})
    assert room["a"].shape == (3, 4)


def test_bytes_for_a_reader():
    assert [gib(n) for n in (1000, 5 << 20, 3 << 29)] == ["1 KiB", "5 MiB", "1.5 GiB"]
