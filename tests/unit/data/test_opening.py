from __future__ import annotations

import sys
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image

from fastsal.data.folders import load_images
from fastsal.data.image_set import ImageSet
from fastsal.data.items import pixels_of
from fastsal.data.opening import is_name, open_images
from fastsal.errors import DataError, FastsalError, InvalidArgument
from fastsal.transfer.tasks import Task

torchvision = pytest.importorskip("torchvision", reason="needs torchvision")


def pixels(n=12, h=5, w=4, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def write_folder(root, x, names=("ant", "bee", "cow")):
    for i, image in enumerate(x):
        folder = root / names[i % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{i:03d}.png")
    return root


# ------------------------------------------------------------------------- files and scikit-learn


def test_folders_and_npz_are_those_of_load_images(tmp_path, tiny_npz):
    found = open_images(tiny_npz.name, root=tiny_npz.parent, classes=["blue", "red"])
    expected = load_images(tiny_npz, classes=["blue", "red"])
    assert (found.x == expected.x).all()
    assert found.source == expected.source
    folder = write_folder(tmp_path / "images", pixels())
    assert open_images(folder).x == open_images("images", root=tmp_path).x
    odd = write_folder(tmp_path / "a:b", pixels())
    assert len(open_images("a:b", root=tmp_path)) == 12
    assert len(open_images(odd)) == 12
    with pytest.raises(
        InvalidArgument, match="train must be None for .*, which has no splits, got True"
    ):
        open_images(folder, train=True)


def test_digits_are_spread_over_all_shades():
    from sklearn.datasets import load_digits

    found = open_images("sklearn:digits")
    assert found.x.shape == (1797, 8, 8, 1)
    assert found.classes == tuple("0123456789")
    original = load_digits()
    assert (found.x[..., 0] == np.round(original.images * 255 / 16)).all()
    assert (found.y == original.target).all()
    assert (found.x.min(), found.x.max()) == (0, 255)
    some = open_images("sklearn:digits", classes=[7, "3"])
    assert some.classes == ("7", "3")
    Task.cut("seven or three", some)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sklearn:digitz", "data must be 'sklearn:digits', got 'sklearn:digitz'"),
        ("sklearn:digits?x=1", "data must be 'sklearn:digits'"),
        ("keras:mnist", "data must be a folder of class folders.*got 'keras:mnist'"),
        ("hf:", "data must be .*got 'hf:' without a name"),
        ("torchvision:MNIST?root", "must be key=value, .*got 'root'"),
        ("torchvision:MNIST?a=1&a=2", "with distinct keys, got 'a=2'"),
        ("torchvision:MNIST?", "must be key=value, .*got ''"),
        ("torchvision:CIFAR", "torchvision has no data set 'CIFAR'; did you mean 'CIFAR10'"),
        ("torchvision:MNIST?rot=/x", "MNIST has no argument 'rot', only root, train, download"),
        ("torchvision:MNIST?transform=x", "has no argument 'transform'"),
        ("torchvision:MNIST?download=yes", "download must be true or false, got 'yes'"),
    ],
)
def test_bad_names(spec, message):
    with pytest.raises(InvalidArgument, match=message):
        open_images(spec)


@pytest.mark.parametrize(
    ("spec", "module", "package"),
    [
        ("sklearn:digits", "sklearn.datasets", "scikit-learn"),
        ("torchvision:MNIST", "torchvision.datasets", "torchvision"),
        ("hf:mnist", "datasets", "datasets"),
    ],
)
def test_a_library_that_is_not_installed(spec, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        FastsalError, match=f"data: '{spec}' requires {package}: pip install {package}"
    ):
        open_images(spec)


# ------------------------------------------------------------------------------------ torchvision


def test_fake_data_of_torchvision_is_read():
    spec = "torchvision:FakeData?size=40&image_size=3,6,5&num_classes=4"
    found = open_images(spec)
    expected = torchvision.datasets.FakeData(40, (3, 6, 5), 4)
    assert found.x.shape == (40, 6, 5, 3)
    assert (found.x[7] == np.array(expected[7][0])).all()
    assert found.y.tolist() == [int(expected[i][1]) for i in range(40)]
    again = open_images("torchvision:FakeData?num_classes=4&image_size=3,6,5&size=40")
    assert again.source == found.source
    other = open_images(spec + "&random_offset=1")
    assert other.source != found.source


def test_files_of_torchvision_are_read_when_they_are_asked_for(tmp_path):
    folder = write_folder(tmp_path / "data", pixels())
    found = open_images("torchvision:ImageFolder?root=data", root=tmp_path)
    expected = load_images(folder)
    assert found.x == expected.x
    assert (found.y == expected.y).all()
    assert found.classes == expected.classes == ("ant", "bee", "cow")
    grey = write_folder(tmp_path / "grey", pixels(c=1))
    assert isinstance(open_images(f"torchvision:ImageFolder?root={grey}").x, tuple)


@pytest.fixture
def library(monkeypatch):
    """Adds a class to `torchvision.datasets`."""

    def add(build):
        datasets = torchvision.datasets
        monkeypatch.setattr(datasets, build.__name__, build, raising=False)
        monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, build.__name__))

    return add


class Parts:
    """Its parts are told apart by `train`; a class has no image."""

    classes = ["zero", "one", "none", "three"]  # noqa: RUF012

    def __init__(self, root, train=True, transform=None, download=False):
        if root.endswith("absent") and not download:
            raise RuntimeError("Dataset not found.\nUse download=True")
        self.n, self.root, self.download = (8 if train else 4), root, download

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Image.fromarray(np.full((3, 3), i, np.uint8)), np.int64([0, 1, 3][i % 3])


class Splits(Parts):
    def __init__(self, root, split: str = "train", year: str = "2012"):
        assert year == "2012"
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(root, split == "train")


class Open(Parts):
    """As EMNIST: an argument of the base class comes by keyword."""

    def __init__(self, root, split: str, **kwargs):
        super().__init__(root, **kwargs)


def test_parts_of_torchvision(library, tmp_path):
    for build in (Parts, Splits, Open):
        library(build)
    for spec, train, n in (
        ("Parts", None, 8),
        ("Parts", True, 8),
        ("Parts", False, 4),
        ("Parts?train=false", True, 4),
        ("Splits", True, 8),
        ("Splits", False, 4),
        ("Splits?split=val", None, 4),
        ("Splits?year=2012", None, 8),
        ("Open?split=letters", False, 4),
        ("Open?split=letters&train=false", None, 4),
    ):
        found = open_images(f"torchvision:{spec}", root=tmp_path, train=train)
        assert len(found) == n, spec
        assert found.classes == ("zero", "one", "three")
        assert found.x.shape == (n, 3, 3, 1)
    a, b = (open_images("torchvision:Parts", train=t) for t in (True, None))
    assert a.source == b.source
    assert a.source != open_images("torchvision:Parts", train=False).source
    some = open_images("torchvision:Parts", classes=["three", 0])
    assert some.classes == ("three", "zero")
    with pytest.raises(DataError, match="contains no image of class 'none'"):
        open_images("torchvision:Parts", classes=["none", "one"])


def test_nothing_is_downloaded_unless_asked_for(library):
    library(Parts)
    with pytest.raises(DataError) as error:
        open_images("torchvision:Parts?root=/absent")
    assert str(error.value) == (
        "data: 'torchvision:Parts?root=/absent' cannot be opened: Dataset not found. "
        "(nothing is downloaded without download=true)"
    )
    assert len(open_images("torchvision:Parts?root=/absent&download=true")) == 8
    with pytest.raises(DataError, match="cannot be opened"):
        open_images("torchvision:Parts?root=/absent&download=false")


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "SVHN", "Flowers102"])
def test_absent_images_of_torchvision_are_one_clear_line(name, tmp_path):
    with pytest.raises(FastsalError, match=r"cannot be opened: .*download=true"):
        open_images(f"torchvision:{name}", root=tmp_path)


def listing(*items):
    class Listing:
        def __len__(self):
            return len(items)

        def __getitem__(self, i):
            return items[i]

    return Listing


GREY, RED = Image.new("L", (4, 4), 9), Image.new("RGB", (4, 4), (255, 0, 0))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(GREY, 0), (Image.new("L", (4, 5)), 1)], "must have one size, got 4x4 and 5x4 .image 1"),
        (
            [(GREY, 0), (GREY, 0.5)],
            "label of image 1 of .* must be an integer or a string, got 0.5",
        ),
        ([(GREY, 0), (GREY, [1])], r"label of image 1 .*, got \[1\]"),
        ([(GREY, "a"), (GREY, 1)], "must be integers or strings, got both"),
        ([(GREY, 0, 1)], "item 0 of .* must be an image and a label, got 3 values"),
        ([GREY], "item 0 of .* must be an image and a label, got Image"),
        (
            [(torch.rand(3, 4, 4), 0)],
            r"must be an image with 8 bits per channel, got float32 \[4, 4, 3\]",
        ),
        ([("x.png", 0)], "must be an image .*got str"),
        ([(Image.new("F", (4, 4)), 0)], "must have 8 bits per channel, got mode F"),
        ([(GREY, 0), (GREY, 0)], "must have at least 2 classes"),
        ([(GREY, -1), (GREY, 0)], "y must be at least 0, got -1"),
        ([], "must have 1 images, got 0"),
    ],
)
def test_items_that_are_no_labelled_images(items, message, library):
    library(listing(*items))
    with pytest.raises(DataError, match=message):
        open_images("torchvision:Listing")


def test_images_of_every_kind(library):
    blue = np.zeros((4, 4, 3), np.uint8)
    blue[..., 2] = 7
    library(
        listing(
            (GREY, 0),
            (RED, torch.tensor(1)),
            (blue, np.int32(0)),
            (torch.from_numpy(blue).permute(2, 0, 1), 1),
            (RED.convert("P"), 0),
            (GREY.convert("1"), 1),
        )
    )
    found = open_images("torchvision:Listing")
    assert found.x.shape == (6, 4, 4, 3)
    assert found.x[:, 0, 0].tolist() == [
        [9, 9, 9], [255, 0, 0], [0, 0, 7], [0, 0, 7], [255, 0, 0], [0, 0, 0],
    ]  # fmt: skip
    assert found.y.tolist() == [0, 1] * 3
    with pytest.raises(DataError, match="must have 1 or 3 channels, got 2"):
        pixels_of(np.zeros((4, 4, 2), np.uint8), "it")


# ----------------------------------------------------------------------------------- Hugging Face


def feature(kind, **fields):
    return type(kind, (), fields)()


class Rows(list):
    features = None


def rows(n=9, image="img", label="label", names=("ant", "bee", "cow")):
    x = pixels(n)
    found = Rows({image: Image.fromarray(x[i]), label: i % 3, "id": i} for i in range(n))
    found.features = {
        "id": feature("Value"),
        image: feature("Image"),
        label: feature("ClassLabel", names=list(names)),
    }
    return found


@pytest.fixture
def hub(monkeypatch):
    """A module `datasets` that has some data sets, and notes how it was asked."""
    module = types.ModuleType("datasets")
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    module.there = {"animals": {"train": rows(9), "test": rows(6)}}
    module.saved, module.calls = {}, []

    def load_dataset(path, split=None, **options):
        module.calls.append((path, split, options, module.config.HF_HUB_OFFLINE))
        if path not in module.there:
            raise FileNotFoundError(f"no data set {path}\nmore")
        if split is not None and split not in module.there[path]:
            raise ValueError(f"Unknown split {split}")
        return module.there[path] if split is None else module.there[path][split]

    module.load_dataset = load_dataset
    module.load_from_disk = lambda path: module.saved[path]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hugging_face_is_asked_for_a_split_and_columns(hub):
    found = open_images("hf:animals?split=train")
    assert (found.x == pixels(9)).all()
    assert found.y.tolist() == [0, 1, 2] * 3
    assert found.classes == ("ant", "bee", "cow")
    assert len(open_images("hf:animals", train=False)) == 6
    assert len(open_images("hf:animals?split=train", train=False)) == 9
    named = open_images("hf:animals?split=train&image=img&label=id")
    assert named.y.tolist() == list(range(9))
    texts = rows()
    for row in texts:
        row["label"] = "xyz"[row["label"]]
    texts.features = None
    hub.there["texts"] = {"train": texts}
    found = open_images("hf:texts?image=img&label=label", classes=["z", "x"])
    assert found.classes == ("z", "x")
    assert found.y.tolist() == [1, 0] * 3
    open_images("hf:texts?config=big&revision=v1&image=img&label=label")
    assert hub.calls[-1] == ("texts", None, {"name": "big", "revision": "v1"}, True)


def test_hugging_face_is_kept_from_the_network_unless_asked(hub):
    open_images("hf:animals?split=train")
    open_images("hf:animals?split=train&download=true")
    assert [call[3] for call in hub.calls] == [True, False]
    with pytest.raises(DataError) as error:
        open_images("hf:planets?split=train")
    assert str(error.value) == (
        "data: 'hf:planets?split=train' cannot be opened: no data set planets "
        "(nothing is downloaded without download=true)"
    )
    assert hub.config.HF_HUB_OFFLINE is False


def test_threads_that_overlap_remain_offline_until_the_last_ends(hub):
    """The switch is that of the process: the first one to end must not switch it back."""
    load, inside = hub.load_dataset, []

    def overlapping(path, split=None, **options):
        if path == "animals":
            done = threading.Thread(target=open_images, args=["hf:others?split=train"])
            done.start()
            done.join()
            inside.append(hub.config.HF_HUB_OFFLINE)
        return load(path, split, **options)

    hub.load_dataset = overlapping
    hub.there["others"] = {"train": rows(9)}
    open_images("hf:animals?split=train")
    assert inside == [True]
    assert hub.config.HF_HUB_OFFLINE is False


def test_threads_that_overlap_the_other_way(hub):
    load, first, second = hub.load_dataset, threading.Event(), threading.Event()

    def overlapping(path, split=None, **options):
        if path == "animals":  # begins first and ends first
            first.set()
            assert second.wait(60)
        else:
            second.set()
            opening.join()
        return load(path, split, **options)

    hub.load_dataset = overlapping
    hub.there["others"] = {"train": rows(9)}
    opening = threading.Thread(target=open_images, args=["hf:animals?split=train"])
    opening.start()
    assert first.wait(60)
    open_images("hf:others?split=train")
    assert [call[3] for call in hub.calls] == [True, True]
    assert hub.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("hf:animals", DataError, "has the splits train, test; choose one with split="),
        ("hf:animals?split=val", DataError, "cannot be opened: Unknown split val"),
        ("hf:animals?split=train&image=im", DataError, "no column 'im', only id, img, label"),
        ("hf:animals?splitt=train", InvalidArgument, "got 'splitt'; did you mean 'split'"),
        (
            "hf:two?split=train",
            DataError,
            "label column of .* is ambiguous among a, b, x; choose one with",
        ),
        ("hf:bare?split=train", DataError, "image column of .* is ambiguous among unnamed columns"),
        ("hf:/no/such/folder", DataError, "there is no folder /no/such/folder"),
    ],
)
def test_bad_names_of_hugging_face(hub, spec, kind, message):
    two = Rows()
    two.features = {"a": feature("ClassLabel"), "b": feature("ClassLabel"), "x": feature("Image")}
    hub.there.update({"two": {"train": two}, "bare": {"train": Rows()}})
    with pytest.raises(kind, match=message):
        open_images(spec)


def test_folders_of_hugging_face(hub, tmp_path):
    (tmp_path / "kept").mkdir()
    hub.saved[str(tmp_path / "kept")] = {"train": rows(9)}
    assert len(open_images(f"hf:{tmp_path}/kept")) == 9
    assert len(open_images("hf:./kept?split=train", root=tmp_path)) == 9
    with pytest.raises(DataError, match="has no split 'test', only train"):
        open_images("hf:./kept?split=test", root=tmp_path)
    with pytest.raises(DataError, match="cannot be opened: no data set kept"):
        open_images("hf:kept", root=tmp_path)  # not saved by the library: a name
    (tmp_path / "kept" / "dataset_dict.json").write_text("{}")
    assert len(open_images("hf:kept", root=tmp_path)) == 9


def test_the_true_library_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    x = pixels(9)
    table = datasets.Dataset.from_dict(
        {"picture": [Image.fromarray(image) for image in x], "label": [0, 1, 2] * 3, "id": [0] * 9},
        features=datasets.Features(
            {
                "picture": datasets.Image(),
                "label": datasets.ClassLabel(names=["ant", "bee", "cow"]),
                "id": datasets.Value("int64"),
            }
        ),
    )
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select(range(6))}).save_to_disk(
        tmp_path / "two"
    )
    for found in (
        open_images(f"hf:{tmp_path / 'one'}"),
        open_images("hf:two?split=train", root=tmp_path),
    ):
        assert isinstance(found, ImageSet)
        assert (found.x == x).all()
        assert found.classes == ("ant", "bee", "cow")
        assert found.y.tolist() == [0, 1, 2] * 3
    assert len(open_images(f"hf:{tmp_path / 'two'}", train=False)) == 6
    with pytest.raises(DataError, match="nothing is downloaded without download=true"):
        open_images("hf:no-such-user/no-such-images?split=train")


def test_names_of_the_readers_of_timm(tmp_path):
    arguments = "?size=6&image_size=3,8,8&num_classes=2"
    found = open_images(f"torch/fake_data{arguments}", root=tmp_path)
    expected = open_images(f"torchvision:FakeData{arguments}", root=tmp_path)
    assert (found.x == expected.x).all()
    assert found.source == expected.source
    assert is_name("torch/cifar10")
    assert is_name("hfds/cifar10?split=train")
    assert not is_name("images/train")
    with pytest.raises(InvalidArgument, match="'wds/imagenet' is streamed, which is not supported"):
        open_images("wds/imagenet")
    folder = tmp_path / "torch" / "fake_data"  # a folder of this name comes first
    for k in range(2):
        (folder / f"class{k}").mkdir(parents=True)
        Image.fromarray(pixels(1)[0]).save(folder / f"class{k}" / "0.png")
    assert open_images("torch/fake_data", root=tmp_path).classes == ("class0", "class1")
