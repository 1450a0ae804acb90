"""`.npz` files with splits, as MedMNIST has them."""

from __future__ import annotations

import numpy as np
import pytest

from fastsal.data.folders import load_images
from fastsal.data.opening import open_images
from fastsal.errors import DataError, InvalidArgument


@pytest.fixture
def medical(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for name, n in (("train", 6), ("val", 4), ("test", 5)):
        arrays[f"{name}_images"] = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        arrays[f"{name}_labels"] = (np.arange(n) % 2).astype(np.uint8)[:, None]
    np.savez(tmp_path / "organs.npz", **arrays)
    return tmp_path / "organs.npz", arrays


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_is_chosen_by_name(medical, split):
    path, arrays = medical
    images = load_images(f"{path}?split={split}")
    assert np.array_equal(images.x[..., 0], arrays[f"{split}_images"])
    assert images.y.tolist() == arrays[f"{split}_labels"][:, 0].tolist()
    assert images.classes == ("0", "1")
    assert images.source.endswith(f"organs.npz?split={split}")
    assert load_images(f"{path}?split={split}", labeled=False).y.max() == 0


def test_train_chooses_a_split(medical):
    path, arrays = medical
    for train, name in ((True, "train"), (False, "test")):
        images = open_images(path.name, root=path.parent, train=train)
        assert np.array_equal(images.x[..., 0], arrays[f"{name}_images"])


def test_splits_are_not_guessed(medical, tmp_path):
    path, arrays = medical
    with pytest.raises(InvalidArgument, match=r"has the splits train, val, test; .*\?split=train"):
        load_images(path)
    with pytest.raises(InvalidArgument, match="no split 'tests', only .*did you mean 'test'"):
        load_images(f"{path}?split=tests")
    np.savez(tmp_path / "one.npz", x=arrays["val_images"], y=np.arange(4) % 2)
    with pytest.raises(InvalidArgument, match="no split 'val', only one set of images"):
        load_images(f"{tmp_path / 'one.npz'}?split=val")
    with pytest.raises(InvalidArgument, match="train must be None"):
        open_images(tmp_path / "one.npz", train=True)
    with pytest.raises(DataError, match=r"there is no file or folder .*none\.npz"):
        load_images(f"{tmp_path / 'none.npz'}?split=val")


def test_several_labels_per_image_are_refused(tmp_path):
    x = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "chest.npz", train_images=x, train_labels=np.zeros((4, 14), np.uint8))
    with pytest.raises(DataError, match=r"one label per image, \[n\] or \[n, 1\], got \[4, 14\]"):
        load_images(f"{tmp_path / 'chest.npz'}?split=train")
