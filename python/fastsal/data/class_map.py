"""Class maps: the output of the model that each class of a data set belongs to.

Class folders are numbered in the order of their names, whatever the order of the model's outputs.
A class map gives each class the index of its output.

A file of a class map is

- JSON: an object `{name: index}`, or `{index: name or [names]}` as many libraries write it, or a
  list of names in the order of the outputs;
- or text: lines `name index`, or names in the order of the outputs, one per line, as timm's class
  maps are.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.utils.numbers import as_integer
from fastsal.utils.paths import user_path
from fastsal.utils.suggestions import did_you_mean, listed

ClassMap = str | os.PathLike[str] | Mapping[str, int] | Sequence[str]
NATURAL = "natural"
IMAGENET = "imagenet"
CLASS_MAP_VALUES = (
    "'imagenet', 'natural', a file, {name: index}, or names in the order of the outputs"
)

MOST_OUTPUTS = 2**20  # of a model
_SUBSET = re.compile(r"imagenet(-\d+k(-\w+)?)?")
_PAIR = re.compile(r"(.*[^\s,;=])[\s,;=]+(-?\d+)")  # a line "name index"


def apply_class_map(
    class_map: ClassMap, y: npt.NDArray[np.int64], classes: Sequence[str], source: str
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return labels that are indices of outputs, and the name of each output.

    Args:
        class_map: A class map, see `load_images`.
        y: Class numbers `[n]`.
        classes: Names of the classes.
        source: Where the images come from, for messages.

    Returns:
        Indices of outputs `[n]`, and names `[k]` of all outputs up to the largest index of the map.

    Raises:
        InvalidArgument: The map is invalid, lacks a class that has images, or has one index for
            two of them.
        FileFormatError: The file of the map cannot be read.
    """
    there = [classes[k] for k in np.unique(y)]
    index = indices_of(class_map, classes, there)
    what = _shown(class_map)
    absent = [name for name in there if name not in index]
    if absent:
        raise InvalidArgument(
            f"class_map: {what} has no class {absent[0]!r} of {source}"
            + (f" (nor {len(absent) - 1} others)" if len(absent) > 1 else "")
            + f", only {listed(list(index))}{did_you_mean(absent[0], index)}"
        )
    holder: dict[int, str] = {}
    for name in there:
        if index[name] in holder:
            raise InvalidArgument(
                f"class_map: the classes of {source} must have distinct indices, got "
                f"{index[name]} for {holder[index[name]]!r} and {name!r}"
            )
        holder[index[name]] = name
    table = np.array([index.get(name, -1) for name in classes], np.int64)
    names = {place: name for name, place in reversed(list(index.items()))}  # the first one counts
    every = tuple(names.get(k, f"output {k}") for k in range(max(names) + 1))
    return table[y], every


def indices_of(
    class_map: ClassMap, classes: Sequence[str], there: Sequence[str] = ()
) -> dict[str, int]:
    """Return `{name: index}` of a class map.

    Args:
        class_map: A class map, see `load_images`.
        classes: Names of the classes, which "natural" sorts.
        there: Names that the map should have; they tell the two kinds of text files apart.
    """
    if isinstance(class_map, Mapping):
        return _checked(class_map.items(), "class_map")
    if isinstance(class_map, (list, tuple)):
        return _checked(_in_order(class_map), "class_map")
    if not isinstance(class_map, (str, os.PathLike)):
        raise InvalidArgument(
            f"class_map must be {CLASS_MAP_VALUES}, got {type(class_map).__name__}"
        )
    text = os.fspath(class_map)
    if text == NATURAL:
        return {name: i for i, name in enumerate(sorted(classes, key=natural_key))}
    if isinstance(class_map, str) and _SUBSET.fullmatch(text):
        return {name: i for i, name in enumerate(_imagenet_names(text))}
    return _checked(_read(user_path(text), there), f"class_map: {text}")


def is_keyword(text: str) -> bool:
    """Whether a class map is one of the words for a class map, not the path of a file."""
    return text == NATURAL or _SUBSET.fullmatch(text) is not None


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that compares numbers in a name by value: class2 before class10."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def imagenet_map(outputs: int | None) -> str:
    """Return the class map of ImageNet for a model, by its number of outputs (None if unknown).

    Raises:
        InvalidArgument: No set of ImageNet classes has so many.
    """
    subset = "imagenet-1k" if outputs is None else imagenet_subset(outputs)
    if subset is None:
        raise InvalidArgument(
            f"class_map must be a file for a model of {outputs} outputs, got 'imagenet', which has "
            "1,000 classes (or 11,221 to 21,843 in larger sets)"
        )
    return subset


def imagenet_subset(outputs: int) -> str | None:
    """Return timm's name of the set of ImageNet classes of this size; None if there is none."""
    import timm.data

    infer: Any = getattr(timm.data, "infer_imagenet_subset")  # noqa: B009 - untyped
    found = infer({"num_classes": outputs})
    return None if found is None else str(found)


def _imagenet_names(subset: str) -> list[str]:
    """Return the WordNet ids of a set of ImageNet classes, in the order of the outputs."""
    import timm.data

    describe: Any = getattr(timm.data, "ImageNetInfo")  # noqa: B009 - untyped
    try:
        info = describe("imagenet-1k" if subset == IMAGENET else subset)
    except AssertionError:
        raise InvalidArgument(
            f"class_map must be {CLASS_MAP_VALUES}, got {subset!r}; timm has imagenet-1k, "
            "imagenet-12k, imagenet-21k and imagenet-22k"
        ) from None
    return list(info.label_names())


def _read(path: Path, there: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the names and indices of a file."""
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise InvalidArgument(f"class_map must be {CLASS_MAP_VALUES}, got {path}, which {why}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"class_map: {path} must be text in UTF-8 ({error})") from None
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
        return _from_json(text, path)
    return _from_lines([line.strip() for line in text.strip().splitlines()], path, there)


def _from_json(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        found = json.loads(text, object_pairs_hook=list)  # keeps duplicate names
    except ValueError as error:
        raise FileFormatError(f"class_map: {path} is not valid JSON ({error})") from None
    # An object is a list of pairs now; a list of names has strings.
    if isinstance(found, list) and all(isinstance(each, str) for each in found):
        return _in_order(found)
    if not isinstance(found, list) or not all(isinstance(each, tuple) for each in found):
        raise FileFormatError(
            f"class_map: {path} must be an object {{name: index}} or a list of names"
        )
    if found and all(key.isdecimal() and isinstance(v, (str, list)) for key, v in found):
        lists = [(int(key), [v] if isinstance(v, str) else v) for key, v in found]
        flat = [(name, key) for key, names in lists for name in names]
        counts = Counter(name for name, _ in flat if isinstance(name, str))
        # A word of two classes, such as "crane", names neither.
        return [(n, key) for n, key in flat if not isinstance(n, str) or counts[n] == 1]
    return found


def _from_lines(lines: list[str], path: Path, there: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the names and indices of lines, `name index` or names in order."""
    pairs = [match for line in lines if line and (match := _PAIR.fullmatch(line))]
    if pairs and len(pairs) == sum(map(bool, lines)):
        named = [(match[1], int(match[2])) for match in pairs]
        # Names may end with a number; then they are found as whole lines.
        if set(there) <= {name for name, _ in named} or not set(there) <= set(lines):
            return named
    if "" in lines:
        number = lines.index("") + 1
        raise FileFormatError(
            f"class_map: {path} must have a name on every line, got none on line {number}"
        )
    return _in_order(lines)


def _in_order(names: Sequence[Any]) -> list[tuple[Any, int]]:
    return [(name, i) for i, name in enumerate(names)]


def _checked(entries: Iterable[tuple[Any, Any]], what: str) -> dict[str, int]:
    """Return `{name: index}` after a check of both."""
    found: dict[str, int] = {}
    for name, value in entries:
        if not isinstance(name, str) or not name:
            raise InvalidArgument(f"{what} must have names of classes, got {name!r:.80}")
        place = as_integer(value)
        if place is None or not 0 <= place < MOST_OUTPUTS:
            raise InvalidArgument(
                f"{what} must have an index of 0 to {MOST_OUTPUTS - 1} for each class, got "
                f"{value!r:.80} for {name!r}"
            )
        if name in found:
            raise InvalidArgument(
                f"{what} must have distinct classes, got {name!r} twice ({found[name]} and {place})"
            )
        found[name] = place
    if not found:
        raise InvalidArgument(f"{what} must have at least one class, got none")
    return found


def _shown(class_map: ClassMap) -> str:
    return (
        repr(class_map)
        if isinstance(class_map, str)
        else (
            "the map" if isinstance(class_map, (Mapping, list, tuple)) else os.fspath(class_map)  # type: ignore[arg-type]
        )
    )
