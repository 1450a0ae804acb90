"""Images of Hugging Face's `datasets`: from its cache, from the Hub, or saved to disk."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from fastsal.data.image_set import ImageSet
from fastsal.data.items import stack_items
from fastsal.data.names import DataName, missing
from fastsal.errors import DataError, InvalidArgument
from fastsal.utils.plain_text import first_line
from fastsal.utils.suggestions import did_you_mean

_KEYS = ("split", "image", "label", "config", "revision", "download")
_ON_DISK = ("state.json", "dataset_dict.json")


def open_hugging_face(name: DataName, train: bool | None) -> ImageSet:
    """Open the data set `hf:NAME?split=...`, see `fastsal.open_images`."""
    for key in name.query:
        if key not in _KEYS:
            raise InvalidArgument(
                f"data: the keys of {name.spec!r} must be among {', '.join(_KEYS)}, got {key!r}"
                f"{did_you_mean(key, _KEYS, n=1)}"
            )
    try:
        import datasets as library
    except ImportError:
        raise missing(name.spec, "datasets") from None
    split = name.query.get("split")
    if split is None and train is not None:
        split = "train" if train else "test"
    found, place = _load(library, name, split)
    if isinstance(found, Mapping):
        if split is None and len(found) > 1:
            raise DataError(
                f"data: {name.spec!r} has the splits {', '.join(map(str, found))}; choose one with "
                "split="
            )
        split = next(iter(found)) if split is None else split
        if split not in found:
            raise DataError(
                f"data: {name.spec!r} has no split {split!r}, only {', '.join(map(str, found))}"
            )
        found = found[split]
    image, label = _columns(found, name)
    shown = {
        "split": split,
        **{key: name.query.get(key) for key in ("config", "revision")},
        "image": image,
        "label": label,
    }
    words = "&".join(f"{key}={value}" for key, value in shown.items() if value is not None)
    if hasattr(found, "select_columns"):
        found = found.select_columns([image, label])  # other columns are not decoded
    names = getattr(_features(found).get(label), "names", None) or []
    items = ((row[image], row[label]) for row in found)
    return stack_items(items, len(found), names, f"hf:{place}?{words}")


def _load(library: Any, name: DataName, split: str | None) -> tuple[Any, str]:
    """Return a data set or a mapping of splits, and its name or folder."""
    path = name.path(name.name)
    is_path = name.name.startswith(("/", ".", "~"))
    if is_path and not path.is_dir():
        raise DataError(f"data: {name.spec!r}: there is no folder {path}")
    is_saved = path.is_dir() and any((path / file).is_file() for file in _ON_DISK)
    try:
        if is_path or is_saved:
            return library.load_from_disk(str(path)), str(path.resolve())
        options = {"name": name.query.get("config"), "revision": name.query.get("revision")}
        options = {key: value for key, value in options.items() if value is not None}
        with contextlib.nullcontext() if name.may_download else _offline(library):
            return library.load_dataset(name.name, split=split, **options), name.name
    except Exception as error:
        hint = "" if name.may_download or is_path else (
            " (nothing is downloaded without download=true)"
        )  # fmt: skip
        raise DataError(
            f"data: {name.spec!r} cannot be opened: {first_line(error)}{hint}"
        ) from error


class _Offline:
    """Switches off the network access of the libraries, for as long as any thread needs it.

    The switches are those of the whole process, as the libraries have no others. With blocks that
    overlap, the first one sets them and the last one restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, str, Any]] = []

    @contextlib.contextmanager
    def __call__(self, library: Any) -> Iterator[None]:
        """Disable network access for the block."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = _switches(library)
                for place, attribute, _ in self._before:
                    setattr(place, attribute, True)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for place, attribute, value in self._before:
                        setattr(place, attribute, value)


_offline = _Offline()


def _switches(library: Any) -> list[tuple[Any, str, Any]]:
    """Return the places, names and values of the switches of a library and of the hub."""
    hub = sys.modules.get("huggingface_hub")
    return [
        (place, attribute, getattr(place, attribute))
        for place in (getattr(library, "config", None), getattr(hub, "constants", None))
        for attribute in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
        if hasattr(place, attribute)
    ]


def _columns(found: Any, name: DataName) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""
    features = _features(found)
    chosen = []
    for key, kind, usual in (("image", "Image", "image"), ("label", "ClassLabel", "label")):
        wanted = name.query.get(key)
        if wanted is not None and features and wanted not in features:
            raise DataError(
                f"data: {name.spec!r} has no column {wanted!r}, only {', '.join(features)}"
            )
        fitting = [column for column, of in features.items() if type(of).__name__ == kind]
        if wanted is None and len(fitting) == 1:
            wanted = fitting[0]
        if wanted is None and usual in features:
            wanted = usual
        if wanted is None:
            raise DataError(
                f"data: the {key} column of {name.spec!r} is ambiguous among "
                f"{', '.join(features) or 'unnamed columns'}; choose one with {key}="
            )
        chosen.append(wanted)
    return chosen[0], chosen[1]


def _features(found: Any) -> Mapping[str, Any]:
    return getattr(found, "features", None) or {}
