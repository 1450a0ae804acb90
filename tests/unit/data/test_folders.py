from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastsal.data.folders import load_images
from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, FileFormatError, InvalidArgument
from fastsal.models.inputs import InputSpec

RGB = InputSpec(3, None, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = InputSpec(1, None, (0.5,), (0.25,))


def pixels(n=6, h=4, w=5, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def write_folder(path, x, y, suffix=".png"):
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        folder = path / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{i:04d}{suffix}")
    return path


def everything(images, spec, **options):
    parts = list(images.batches(spec, **options))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_npz_and_folder_give_the_same_batches(tmp_path):
    x, y = pixels(), np.array([0, 0, 0, 1, 1, 1])
    np.savez(tmp_path / "d.npz", x=x, y=y)
    folder = load_images(write_folder(tmp_path / "d", x, y))
    for spec in (RGB, GREY, InputSpec(3, (8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear")):
        a = everything(load_images(tmp_path / "d.npz"), spec, batch_size=4)
        b = everything(folder, spec, batch_size=4)
        assert torch.equal(a[1], b[1])
        torch.testing.assert_close(a[0], b[0])
    assert folder.classes == ("class0", "class1")


def test_normalisation_is_the_formula():
    x = pixels()
    got, labels = everything(ImageSet(x, np.arange(6) % 2), RGB)
    expected = (x / 255 - np.array(RGB.mean)) / np.array(RGB.std)
    np.testing.assert_allclose(got.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    assert got.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_grey_is_repeated_and_rgb_becomes_luminance():
    grey = ImageSet(pixels(c=1)[..., 0], np.arange(6) % 2)
    got, _ = everything(grey, InputSpec(3, None, (0.5,) * 3, (0.5,) * 3))
    assert got.shape == (6, 3, 4, 5)
    assert torch.equal(got[:, 0], got[:, 2])
    x = pixels()
    got, _ = everything(ImageSet(x, np.arange(6) % 2), GREY)
    expected = (x @ np.array([0.299, 0.587, 0.114]) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(got[:, 0].numpy(), expected, atol=1e-4)


def test_resizing_matches_pillow_and_crops_the_longer_side():
    x = pixels(n=2, h=20, w=30)
    spec = InputSpec(3, (10, 10), (0.0,) * 3, (1.0,) * 3, "bilinear")
    got, _ = everything(ImageSet(x, np.array([0, 1])), spec)
    reference = Image.fromarray(x[0]).resize((15, 10), Image.Resampling.BILINEAR)
    expected = np.asarray(reference)[:, 2:12].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1.5 / 255)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10), st.booleans())
def test_batches_cover_what_was_asked_once_and_again(n, size, start, shuffle):
    images = ImageSet(np.arange(n, dtype=np.uint8)[:, None, None], np.arange(n))
    if start >= n:
        with pytest.raises(DataError, match="start must be less than"):
            images.batches(GREY, start=start)
        return
    batches = images.batches(GREY, size, start=start, shuffle_seed=3 if shuffle else None)
    first = torch.cat([y for _, y in batches])
    assert torch.equal(first, torch.cat([y for _, y in batches]))
    assert len(first.unique()) == len(first) == n - start == batches.samples
    assert len(list(batches)) == len(batches)
    if not shuffle:
        assert first.tolist() == list(range(start, n))


def test_shuffled_parts_of_one_seed_are_disjoint():
    images = ImageSet(pixels(30), np.arange(30))
    parts = [images.batches(RGB, 7, 10, start, shuffle_seed=1) for start in (0, 10, 20)]
    seen = torch.cat([y for part in parts for _, y in part])
    assert sorted(seen.tolist()) == list(range(30))


def test_fewer_images_than_samples_is_an_error():
    with pytest.raises(DataError, match=r"samples must be at most 4, .* after the first 2, got 7"):
        ImageSet(pixels(), np.arange(6) % 2).batches(RGB, samples=7, start=2)


@pytest.mark.parametrize(
    ("options", "name"), [({"batch_size": 0}, "batch_size"), ({"start": -1}, "start")]
)
def test_bad_batch_options(options, name):
    with pytest.raises(InvalidArgument, match=name):
        ImageSet(pixels(), np.arange(6) % 2).batches(RGB, **options)


def test_subset_and_classes_keep_track_of_their_source():
    images = ImageSet(pixels(), np.array([0, 1, 2, 0, 1, 2]), ("a", "b", "c"), "here")
    chosen = images.select_classes(["c", "a"])
    assert chosen.classes == ("c", "a")
    assert chosen.y.tolist() == [1, 0, 1, 0]
    assert chosen.subset([1, 3]).index.tolist() == [2, 5]
    assert np.array_equal(chosen.x, images.x[[0, 2, 3, 5]])
    for bad in ([9], [-1], [], [0.5]):
        with pytest.raises(InvalidArgument, match="indices"):
            images.subset(bad)
    for bad in (["a"], ["a", "a"], ["a", "cc"], [0, 7]):
        with pytest.raises(InvalidArgument, match="classes"):
            images.select_classes(bad)


def test_digits_are_the_name_of_a_class_before_they_are_a_number():
    images = ImageSet(pixels(), np.array([0, 1, 2, 0, 1, 2]), ("0", "10", "2"), "here")
    assert images.select_classes(["2", "10"]).index.tolist() == [1, 2, 4, 5]
    assert images.select_classes([2, 1]).index.tolist() == [1, 2, 4, 5]
    assert images.select_classes(["1", "0"]).classes == ("10", "0")  # no class is called 1
    for bad in ("3", "²", "-1"):
        with pytest.raises(InvalidArgument, match=f"no class '{bad}'"):
            images.select_classes(["0", bad])


def test_split_is_disjoint_and_stratified():
    images = ImageSet(pixels(60), np.arange(60) % 3)
    a, b, c = images.split(0.5, 0.3, 0.2, seed=4)
    assert sorted(np.concatenate([a.index, b.index, c.index]).tolist()) == list(range(60))
    assert [np.bincount(part.y).tolist() for part in (a, b, c)] == [[10] * 3, [6] * 3, [4] * 3]
    with pytest.raises(InvalidArgument, match="fractions must sum to 1"):
        images.split(0.5, 0.6)
    with pytest.raises(DataError, match="too few"):
        images.split(0.99, 0.01)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.arange(6)}, "must contain the arrays x and y, got y"),
        ({"x": pixels().astype(np.float32), "y": np.arange(6)}, "x must be uint8 .*got float32"),
        ({"x": pixels()[0, 0], "y": np.arange(5)}, "x must be uint8 .*got uint8 .5, 3"),
        (
            {"x": pixels().transpose(0, 3, 1, 2).repeat(9, 3), "y": np.arange(6)},
            "channels must be last",
        ),
        ({"x": pixels(), "y": np.arange(5)}, r"y must be integers \[6\], .*got int64 \[5\]"),
        ({"x": pixels(), "y": np.arange(6.0)}, "y must be integers .*float64"),
        ({"x": pixels(), "y": np.arange(6) - 1}, "y must be at least 0, got -1"),
        (
            {"x": pixels(), "y": np.arange(6), "classes": np.array(["a", "b"])},
            "y must be less than the number of classes, 2, got 5",
        ),
        ({"x": pixels(), "y": np.zeros(6, int)}, "must have at least 2 classes"),
        ({"x": pixels(0), "y": np.arange(0)}, "x must not be empty"),
    ],
)
def test_bad_npz_files(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "d.npz")


def test_damaged_and_pickled_npz_files(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, x=pixels(), y=np.array([0, 1, None] * 2, object))
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_images(path)
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_images(path)


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(DataError, match=r"an \.npz file"):
        load_images(tmp_path / "note.txt")
    with pytest.raises(
        DataError, match="must contain one folder of images per class, got no folder"
    ):
        load_images(tmp_path)
    folder = write_folder(tmp_path / "d", pixels(2), [0, 0])
    with pytest.raises(DataError, match="must contain at least 2 class folders, got class0 only"):
        load_images(folder)
    (folder / "empty").mkdir()
    (folder / "empty" / "note.txt").write_text("")
    with pytest.raises(DataError, match="empty contains no image file"):
        load_images(folder)


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_an_unreadable_image_is_named(tmp_path, damage):
    folder = write_folder(tmp_path / "d", pixels(6, 40, 40), [0, 0, 0, 1, 1, 1])
    path = folder / "class1" / "0004.png"
    path.write_bytes(b"not an image" if damage == "text" else path.read_bytes()[:400])
    images = load_images(folder)
    with pytest.raises(DataError, match=r"0004\.png cannot be read"):
        everything(images, RGB)


def test_an_unknown_kind_of_a_known_format_is_named(tmp_path):
    """Pillow raises NotImplementedError of some files, among errors of other types."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "DDS")
    folder = write_folder(tmp_path / "d", pixels(n=2), [0, 1])
    (folder / "class0" / "0002.png").write_bytes(content.getvalue()[:80] + bytes(300))
    with pytest.raises(DataError, match=r"0002\.png cannot be read as an image \(Unknown"):
        everything(load_images(folder), RGB, workers=0)


def test_links_to_nothing_are_named(tmp_path):
    folder = write_folder(tmp_path / "d", pixels(n=2), [0, 1])
    (folder / "class0" / "0002.png").symlink_to(folder / "class1" / "0001.png")
    assert len(load_images(folder)) == 3
    (folder / "class0" / "0003.png").symlink_to(tmp_path / "not mounted" / "0003.png")
    with pytest.raises(DataError, match=r"0003\.png is a link to a file that does not exist$"):
        load_images(folder)
    (folder / "class0" / "0004.png").symlink_to(tmp_path / "not mounted" / "0004.png")
    with pytest.raises(DataError, match=r"0003\.png .*, one of 2 such links"):
        load_images(folder)


def test_images_of_two_sizes_need_a_size(tmp_path):
    folder = write_folder(tmp_path / "d", pixels(2), [0, 0])
    write_folder(folder, pixels(2, 9, 9), [1, 1], ".bmp")
    images = load_images(folder)
    with pytest.raises(DataError, match=r"size must be given .*9x9 pixels \(.*bmp\)"):
        everything(images, RGB)
    got, _ = everything(images, InputSpec(3, (6, 6), RGB.mean, RGB.std))
    assert got.shape == (4, 3, 6, 6)


def test_sixteen_bit_images_are_refused(tmp_path):
    folder = write_folder(tmp_path / "d", pixels(4), [0, 0, 1, 1])
    Image.fromarray(np.full((4, 5), 40000, np.uint16)).save(folder / "class0" / "9999.png")
    with pytest.raises(DataError, match=r"9999\.png must have 8 bits per channel, got mode I"):
        everything(load_images(folder), RGB)


def test_channels_that_do_not_fit():
    with pytest.raises(DataError, match="must have 3 channels for this model, got 4"):
        everything(ImageSet(pixels(c=4), np.arange(6)), RGB)


def test_classes_of_the_shared_data(shared_data):
    images = load_images(shared_data / "mnist_test.npz", classes=[3, 5])
    assert len(images) == 600
    assert set(images.y.tolist()) == {0, 1}


def test_images_without_labels(tmp_path):
    x, y = pixels(), np.array([0, 0, 0, 1, 1, 1])
    flat = tmp_path / "flat"
    (flat / "deeper").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(x[i]).save(flat / f"{i}.png")
        Image.fromarray(x[3 + i]).save(flat / "deeper" / f"{i}.png")
    (flat / "note.txt").write_text("no image")
    found = load_images(flat, labeled=False)
    assert [p.relative_to(flat).as_posix() for p in found.x] == [
        "0.png", "1.png", "2.png", "deeper/0.png", "deeper/1.png", "deeper/2.png"
    ]  # fmt: skip
    assert (found.classes, found.y.tolist()) == (("0",), [0] * 6)
    assert load_images(flat / "deeper", labeled=False).y.tolist() == [0, 0, 0]
    np.savez(tmp_path / "x.npz", x=x, classes=np.array(["a", "b"]))
    assert np.array_equal(load_images(tmp_path / "x.npz", labeled=False).x, x)
    # Labels are kept where there are some, so that positions are the same.
    np.savez(tmp_path / "d.npz", x=x, y=y)
    for path in (tmp_path / "d.npz", write_folder(tmp_path / "d", x, y)):
        a, b = load_images(path), load_images(path, labeled=False)
        assert a.classes == b.classes
        assert np.array_equal(a.y, b.y)
        assert list(map(str, a.x)) == list(map(str, b.x))
    with pytest.raises(DataError, match="must contain the arrays x and y, got x"):
        load_images(tmp_path / "x.npz")
    with pytest.raises(DataError, match="must contain at least 2 class folders, got"):
        load_images(flat)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no image file ..bmp"):
        load_images(tmp_path / "empty", labeled=False)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_numpy_and_torch_scalars_are_numbers(number):
    images = ImageSet(pixels(30), np.arange(30) % 3)
    batches = images.batches(RGB, number(7), number(10), number(5), shuffle_seed=number(1))
    same = images.batches(RGB, 7, 10, 5, shuffle_seed=1)
    assert np.array_equal(batches.order, same.order)
    assert (batches.batch_size, len(batches), batches.samples) == (7, 2, 10)
    assert images.select_classes([number(2), number(0)]).classes == ("2", "0")
    a, b = images.split(np.float32(0.5), torch.tensor(0.5), seed=number(4))
    c, d = images.split(0.5, 0.5, seed=4)
    assert np.array_equal(a.index, c.index)
    assert np.array_equal(b.index, d.index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": True}, "batch_size must be an integer, got True"),
        ({"start": 0.5}, "start must be an integer, got 0.5"),
        ({"samples": "3"}, "samples must be an integer, got '3'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"shuffle_seed": -1}, "shuffle_seed must be at least 0, got -1"),
    ],
)
def test_what_is_no_number_of_images_is_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        ImageSet(pixels(), np.arange(6) % 2).batches(RGB, **options)


def test_fractions_are_positive_numbers():
    images = ImageSet(pixels(60), np.arange(60) % 3)
    with pytest.raises(InvalidArgument, match="fractions must be positive, got 0"):
        images.split(1.0, 0)
    with pytest.raises(InvalidArgument, match="fractions must be a number, got True"):
        images.split(True)
    with pytest.raises(InvalidArgument, match="classes: .* has no class True"):
        images.select_classes([True, 0])


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JFIF"])
def test_jpeg_files_of_other_suffixes(tmp_path, suffix):
    x, y = pixels(), np.arange(6) % 2
    write_folder(tmp_path / "d", x, y, ".jpg")
    for file in (tmp_path / "d").rglob("*.jpg"):
        file.rename(file.with_suffix(suffix))
    assert len(load_images(tmp_path / "d")) == 6
    assert len(everything(load_images(tmp_path / "d"), RGB)[1]) == 6


def test_linked_folders_are_read_once(tmp_path):
    """Links to another disk, to a folder beside it, and back to the class folder."""
    data, disk = tmp_path / "d", tmp_path / "disk"
    write_folder(data, pixels(), np.arange(6) % 2)
    write_folder(disk, pixels(), np.zeros(6, int))  # disk/class0
    first = data / "class0"
    (first / "a-link").symlink_to(disk / "class0")  # what the second link has, too
    (first / "more").symlink_to(disk)
    (first / "again").symlink_to(disk)
    (disk / "loop").symlink_to(first)
    (first / "up").symlink_to(data)
    (first / "self").symlink_to(first)
    images = load_images(data)
    assert np.bincount(images.y).tolist() == [3 + 6, 3]
    assert len({place.resolve() for place in images.x}) == len(images)
    (first / "own").mkdir()
    (first / "own" / "b").symlink_to(tmp_path / "missing")
    with pytest.raises(DataError, match="own/b is a link to a file or folder that does not exist"):
        load_images(data)


def test_archives_beside_class_folders_are_named(tmp_path):
    write_folder(tmp_path / "d", pixels(), np.arange(6) % 2)
    (tmp_path / "d" / "class2.tar").touch()
    with pytest.warns(UserWarning, match=r"class2\.tar in .*d is not read"):
        assert load_images(tmp_path / "d").classes == ("class0", "class1")


def test_images_beside_class_folders_are_named(tmp_path):
    x = pixels(4)
    write_folder(tmp_path, x, np.arange(4) % 2)
    for name in ("one.png", ".hidden.png"):
        Image.fromarray(x[0]).save(tmp_path / name)
    with pytest.warns(UserWarning, match=r"one.png in .* is not read: beside .*, images are not"):
        images = load_images(tmp_path)
    assert len(images) == 4


def test_hidden_folders_are_not_read(tmp_path):
    x = pixels(4)
    write_folder(tmp_path, x, np.arange(4) % 2)
    expected = load_images(tmp_path).x
    for folder in sorted(p for p in tmp_path.iterdir() if p.is_dir()):
        for inside in (".thumbnails", ".ipynb_checkpoints/deep"):
            (folder / inside).mkdir(parents=True)
            Image.fromarray(x[0]).save(folder / inside / "copy.png")
    assert load_images(tmp_path).x == expected
    (tmp_path / "all" / ".cache").mkdir(parents=True)
    Image.fromarray(x[0]).save(tmp_path / "all" / ".cache" / "a.png")
    with pytest.raises(DataError, match="contains no image file"):
        load_images(tmp_path / "all", labeled=False)
