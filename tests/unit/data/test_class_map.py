"""Class maps: labels are indices of the model's outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fastsal.data.class_map import imagenet_map, indices_of, natural_key
from fastsal.data.folders import load_images
from fastsal.data.image_set import ImageSet
from fastsal.data.opening import open_images
from fastsal.errors import FileFormatError, InvalidArgument

INDEX = {"cat": 3, "dog": 5, "frog": 6, "ship": 8}
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def folder_of(path, names, each=2):
    rng = np.random.default_rng(0)
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(each):
            x = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(x).save(path / name / f"{i}.png")
    return path


def image_set(names, **options):
    y = np.repeat(np.arange(len(names)), 2)
    return ImageSet(np.zeros((len(y), 2, 2, 3), np.uint8), y, tuple(names), **options)


FILES = {
    "object.json": json.dumps(INDEX),
    "list.json": json.dumps(CIFAR),
    "by_index.json": json.dumps({str(i): name for i, name in enumerate(CIFAR)}),
    "by_index_words.json": json.dumps(
        # As Keras writes it; "crane" is a word of two classes, and names neither.
        {str(i): [name, "crane" if i < 2 else f"a {name}"] for i, name in enumerate(CIFAR)}
    ),
    "pairs.txt": "\n".join(f"{name} {i}" for name, i in INDEX.items()) + "\n\n",
    "tabs.tsv": "\n".join(f"{name}\t{i}" for name, i in INDEX.items()),
    "commas.csv": "\r\n".join(f"{name},{i}" for name, i in INDEX.items()),
    "names.txt": "\n".join(CIFAR) + "\n",
    "bom.txt": "\ufeff" + "\n".join(CIFAR),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_form(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    images = load_images(folder_of(tmp_path / "d", INDEX), class_map=path)
    assert images.y.tolist() == [i for i in INDEX.values() for _ in range(2)]
    assert [images.classes[i] for i in INDEX.values()] == list(INDEX)
    assert images.numbering == "map"


@pytest.mark.parametrize("class_map", [INDEX, CIFAR, tuple(CIFAR)])
def test_maps_in_python(tmp_path, class_map):
    path = folder_of(tmp_path / "d", INDEX)
    expected = [i for i in INDEX.values() for _ in range(2)]
    assert load_images(path, class_map=class_map).y.tolist() == expected
    assert open_images(path, class_map=class_map).y.tolist() == expected
    assert image_set(INDEX, class_map=class_map).y.tolist() == expected
    assert image_set(INDEX).map_classes(class_map).y.tolist() == expected
    np.savez(
        tmp_path / "d.npz",
        x=np.zeros((8, 2, 2, 3), np.uint8),
        y=np.repeat(np.arange(4), 2),
        classes=np.array(list(INDEX)),
    )
    assert load_images(tmp_path / "d.npz", class_map=class_map).y.tolist() == expected


def test_names_that_end_with_a_number(tmp_path):
    """Lines `class 10` are names in order where the folders are called so, else pairs."""
    names = [f"class {i}" for i in (7, 2, 10)]
    path = tmp_path / "map.txt"
    path.write_text("\n".join(names))
    images = load_images(folder_of(tmp_path / "d", names), class_map=path)
    assert [images.classes[k] for k in (0, 1, 2)] == names
    # Folders in the order of their names: class 10, class 2, class 7.
    assert images.y.tolist() == [2, 2, 1, 1, 0, 0]
    path.write_text("class 4\nother 1\n")
    pairs = load_images(folder_of(tmp_path / "e", ["class", "other"]), class_map=path)
    assert pairs.y.tolist() == [4, 4, 1, 1]


def test_imagenet_is_the_order_of_the_thousand_ids():
    from timm.data import ImageNetInfo

    ids = ImageNetInfo().label_names()
    some = [ids[i] for i in (999, 0, 388, 7)]
    images = image_set(some, class_map="imagenet")
    assert images.y[::2].tolist() == [999, 0, 388, 7]
    assert images.classes == tuple(ids)
    assert imagenet_map(1000) == imagenet_map(None) == "imagenet-1k"
    larger = ImageNetInfo("imagenet-12k").label_names()
    assert imagenet_map(11821) == "imagenet-12k"
    assert indices_of("imagenet-12k", [])[larger[-1]] == 11820
    with pytest.raises(InvalidArgument, match="must be a file for a model of 37 outputs"):
        imagenet_map(37)
    with pytest.raises(InvalidArgument, match="'imagenet-99k'; timm has"):
        image_set(some, class_map="imagenet-99k")


def test_natural_order():
    names = [f"class{i}" for i in range(12)]
    sorted_names = sorted(names)
    images = image_set(sorted_names, class_map="natural")
    assert [images.classes[k] for k in range(12)] == names
    assert images.y[::2].tolist() == [int(name[5:]) for name in sorted_names]
    assert images.numbering == "natural"
    mixed = ["B2", "a10", "a2", "b10", "007", "7"]
    assert sorted(mixed, key=natural_key) == ["007", "7", "a2", "a10", "B2", "b10"]


def test_classes_without_images():
    images = image_set(["cat", "ship"], class_map=INDEX)
    assert images.y.tolist() == [3, 3, 8, 8]
    assert len(images.classes) == 9
    first, second = images.split(0.5, 0.5)
    assert sorted(first.y) == sorted(second.y) == [3, 8]
    assert first.classes == images.classes
    assert images.select_classes(["ship", "cat"]).y.tolist() == [1, 1, 0, 0]


def test_folders_in_the_order_of_a_map_are_still_sorted_by_class():
    """The first samples would otherwise be of one class: they are shuffled only if sorted."""
    images = image_set(["a", "b", "c"], class_map={"a": 2, "b": 0, "c": 1})
    assert images.is_sorted_by_class
    mixed = ImageSet(np.zeros((4, 2, 2, 3), np.uint8), np.array([0, 1, 0, 1]))
    assert not mixed.is_sorted_by_class


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"cat": 3}, r"the map has no class 'dog' of .*\(nor 2 others\), only cat"),
        ({**INDEX, "dog": 3}, "must have distinct indices, got 3 for 'cat' and 'dog'"),
        ({**INDEX, "dog": -1}, "must have an index of 0 to .*, got -1 for 'dog'"),
        ({**INDEX, "dog": 2.5}, "must have an index of 0 to .*, got 2.5 for 'dog'"),
        ({**INDEX, "dog": True}, "must have an index of 0 to .*, got True for 'dog'"),
        ({**INDEX, "dog": 10**9}, "must have an index of 0 to .*, got 1000000000 for 'dog'"),
        ([*INDEX, "dog"], "must have distinct classes, got 'dog' twice"),
        ({}, "must have at least one class, got none"),
        ([], "must have at least one class, got none"),
        ([1, 2], "must have names of classes, got 1"),
        (7, "class_map must be 'imagenet', 'natural', a file, .*, got int"),
        ("imagnet", "class_map must be .*, got imagnet, which does not exist"),
    ],
)
def test_invalid_maps(class_map, message):
    with pytest.raises(InvalidArgument, match=message):
        image_set(INDEX, class_map=class_map)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"cat": 3, "dog": 5, "frog": 6, "ship": 8, "cat": 1}', InvalidArgument, "'cat' twice"),
        ("cat 3\ndog 5\nfrog 6\nship 8\ncat 1", InvalidArgument, "'cat' twice"),
        ('{"cat": 3, ', FileFormatError, "is not valid JSON"),
        ('[["cat", 3]]', FileFormatError, "must be an object"),
        ("[3, 5]", FileFormatError, "must be an object"),
        ("cat\n\ndog\nfrog\nship", FileFormatError, "a name on every line, got none on line 2"),
        ("cat 3\ndog 5\nfrog 6\n", InvalidArgument, "has no class 'ship'"),
        ("", InvalidArgument, "at least one class"),
    ],
)
def test_invalid_files(tmp_path, text, error, message):
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(error, match=message):
        image_set(INDEX, class_map=path)


def test_other_files(tmp_path):
    (tmp_path / "map.txt").write_bytes(b"\xff\xfe cat")
    with pytest.raises(FileFormatError, match="must be text in UTF-8"):
        image_set(INDEX, class_map=tmp_path / "map.txt")
    with pytest.raises(InvalidArgument, match="which is a folder"):
        image_set(INDEX, class_map=tmp_path)
    with pytest.raises(InvalidArgument, match="class_map must be None with classes"):
        load_images(folder_of(tmp_path / "d", INDEX), classes=["cat", "dog"], class_map=INDEX)
