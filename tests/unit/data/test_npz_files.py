"""`.npz` files with splits, as MedMNIST has them."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from fastsal.data.folders import lacks_labels, load_images
from fastsal.data.opening import open_images
from fastsal.errors import DataError, FileFormatError, InvalidArgument


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


def damaged(path, **members):
    """Write an archive of the parts of an `.npz` file, of which some are replaced by `members`."""
    arrays = {"x": np.zeros((4, 8, 8), np.uint8), "y": np.arange(4) % 2}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in dict.fromkeys((*arrays, *members)):
            buffer = io.BytesIO()
            np.save(buffer, arrays.get(name, np.array(["a", "b"])))
            content = members.get(name, buffer.getvalue())
            file.writestr(f"{name}.npy" if content[:6] == b"\x93NUMPY" else name, content)
    return path


def header(shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x": b"pixels"}, "x is not stored as an array"),
        ({"y": b"labels"}, "y is not stored as an array"),
        ({"classes": b"a b"}, "classes is not stored as an array"),
        ({"x": header((2**50, 8, 8))}, "Unable to allocate"),
        ({"x": header((2**70, 8, 8))}, "too large"),
    ],
)
def test_what_is_no_array_is_a_damaged_file(tmp_path, members, message):
    path = damaged(tmp_path / "d.npz", **members)
    with pytest.raises(FileFormatError, match=rf"d\.npz cannot be read as \.npz \(.*{message}"):
        load_images(path)


def test_bytes_that_cannot_be_decompressed_are_a_damaged_file(tmp_path):
    x = np.random.default_rng(0).integers(0, 9, (64, 8, 8), dtype=np.uint8)
    np.savez_compressed(tmp_path / "d.npz", x=x, y=np.arange(64) % 2)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"d\.npz cannot be read as \.npz"):
        load_images(tmp_path / "d.npz")


def test_one_array_is_no_npz_file(tmp_path):
    with open(tmp_path / "d.npz", "wb") as file:
        np.save(file, np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(FileFormatError, match="a single array"):
        load_images(tmp_path / "d.npz")


def test_names_of_classes_are_text(tmp_path):
    x, y = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
    np.savez(tmp_path / "d.npz", x=x, y=y, classes=np.array([b"a", b"\xff"]))
    with pytest.raises(DataError, match=r"names in UTF-8, got b'\\xff'"):
        load_images(tmp_path / "d.npz")


@pytest.mark.parametrize("offset", [2**40, 2**63])
def test_a_label_is_the_number_of_a_class(tmp_path, offset):
    """Each class up to the largest label has a name: those of so many would fill the memory."""
    y = np.arange(4, dtype=np.uint64) + np.uint64(offset)
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 8, 8), np.uint8), y=y)
    with pytest.raises(DataError, match=f"y must be less than 1048576, got {offset + 3} in"):
        load_images(tmp_path / "d.npz")


def test_a_damaged_archive_is_not_said_to_lack_labels(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 8, 8), np.uint8))
    assert lacks_labels(tmp_path / "d.npz")
    content = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x09"))
    assert not lacks_labels(tmp_path / "d.npz")
