from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastsal.data.content import content_of
from fastsal.data.folders import load_images
from fastsal.errors import DataError, FileFormatError
from fastsal.models.inputs import InputSpec

SPEC = InputSpec(3, (8, 8), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        place = tmp_path / "set" / f"class{k % 2}" / ("deeper" if k > 3 else "")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{k}.png")
    (tmp_path / "set" / "class0" / "notes.txt").write_text("no image")
    return tmp_path / "set"


def everything(images, **options):
    return torch.cat([x for x, _ in images.batches(SPEC, 2, cache=0, **options)])


def packed(path, folder, under="."):
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=under)
    return path


def per_class(folder, place):
    place.mkdir()
    for each in sorted(folder.iterdir()):
        packed(place / f"{each.name}.tar", each)
    return place


@pytest.mark.parametrize("under", [".", "set", "some/where"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_archive_is_the_folder_in_it(tmp_path, folder, under, workers):
    expected = load_images(folder)
    images = load_images(packed(tmp_path / "set.tar", folder, under))
    assert images.classes == expected.classes == ("class0", "class1")
    assert images.y.tolist() == expected.y.tolist()
    assert images.numbering == "sorted"
    assert torch.equal(everything(images, workers=workers), everything(expected))
    assert content_of(images) == content_of(expected)


def test_archives_of_classes_and_archives_in_an_archive(tmp_path, folder):
    expected = load_images(folder)
    place = per_class(folder, tmp_path / "tars")
    for images in (load_images(place), load_images(packed(tmp_path / "all.tar", place))):
        assert images.classes == expected.classes
        assert images.y.tolist() == expected.y.tolist()
        assert torch.equal(everything(images), everything(expected))
    assert str(images.x[0]).endswith("all.tar/class0.tar/0.png")


def test_labels_are_optional(tmp_path, folder):
    flat = packed(tmp_path / "flat.tar", folder / "class1")
    images = load_images(flat, labeled=False)
    assert images.y.tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="must be in one folder or archive per class"):
        load_images(flat)


def test_archives_that_cannot_be_read_are_refused(tmp_path, folder):
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as archive:
        archive.add(folder, arcname=".")
    with pytest.raises(FileFormatError, match="cannot be read as a tar archive without compres"):
        load_images(tmp_path / "gz.tar")
    (tmp_path / "gz.tar").rename(tmp_path / "set.tar.gz")
    with pytest.raises(DataError, match="must be a tar archive without compression, got"):
        load_images(tmp_path / "set.tar.gz")
    with tarfile.open(tmp_path / "empty.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    with pytest.raises(DataError, match=r"empty\.tar contains no image file"):
        load_images(tmp_path / "empty.tar")


def test_an_archive_that_shrinks_is_named(tmp_path, folder):
    path = packed(tmp_path / "set.tar", folder)
    images = load_images(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"set\.tar is truncated at class0/0\.png"):
        everything(images)
