"""Images of `torchvision.datasets`: any class whose items are `(image, label)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastsal.data.image_set import ImageSet, Numbering
from fastsal.data.items import numbered, pixels_of, stack_items
from fastsal.data.names import DataName, missing
from fastsal.errors import DataError, InvalidArgument
from fastsal.utils.suggestions import did_you_mean

# Arguments that are functions, which a text cannot specify.
_FUNCTIONS = ("transform", "target_transform", "transforms", "loader", "is_valid_file")


def open_torchvision(name: DataName, train: bool | None) -> ImageSet:
    """Open the data set `torchvision:CLASS?argument=value`, see `fastsal.open_images`."""
    try:
        import torchvision.datasets as library
    except ImportError:
        raise missing(name.spec, "torchvision") from None
    known = [each for each in library.__all__ if inspect.isclass(getattr(library, each))]
    chosen = name.name
    if chosen not in known:  # timm names them so: fashion_mnist, cifar10
        plain = chosen.replace("_", "").lower()
        chosen = next((each for each in known if each.lower() == plain), "")
    if not chosen:
        raise InvalidArgument(
            f"data: {name.spec!r}: torchvision has no data set {name.name!r}"
            f"{did_you_mean(name.name, known)}"
        )
    build = getattr(library, chosen)
    dataset, arguments = _build(name, build, train)
    shown = "&".join(f"{key}={value}" for key, value in sorted(arguments.items()))
    source = f"torchvision:{chosen}" + (f"?{shown}" if shown else "")
    try:
        n = len(dataset)
    except TypeError:
        raise DataError(
            f"data: {source} must have a length; streamed data sets are not supported"
        ) from None
    classes = _class_names(dataset)
    numbering: Numbering = "sorted" if isinstance(dataset, library.DatasetFolder) else "data"
    files = _files(dataset, n)
    if files is not None:
        y, classes = numbered([label for _, label in files], classes, source)
        paths = tuple(path for path, _ in files)
        return ImageSet(paths, y, tuple(classes), source, numbering=numbering)
    return stack_items((_pair(dataset[i], i, source) for i in range(n)), n, classes, source)


def _build(
    name: DataName, build: Callable[..., Any], train: bool | None
) -> tuple[Any, dict[str, Any]]:
    """Return the data set and the arguments that identify its images."""
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(build).parameters.items()
        if key not in _FUNCTIONS and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    is_open = any(
        p.kind is inspect.Parameter.VAR_KEYWORD
        for p in inspect.signature(build).parameters.values()
    )
    for key in name.query:
        if key in _FUNCTIONS or (key not in parameters and not is_open):
            raise InvalidArgument(
                f"data: {name.spec!r}: torchvision's {name.name} has no argument {key!r}, only "
                f"{', '.join(parameters)}"
            )
    given = {
        key: _value(text, parameters[key].annotation if key in parameters else None)
        for key, text in name.query.items()
    }
    given.pop("download", None)
    if "root" in parameters:
        given["root"] = str(name.path(name.query.get("root", "")).absolute())
    choices = [given]
    if train is not None and "train" not in given:
        if "train" in parameters or (is_open and "split" in given):
            choices = [{**given, "train": train}]
        elif "split" in parameters and "split" not in given:
            names = ("train",) if train else ("test", "val")  # a class supports one of the two
            choices = [{**given, "split": split} for split in names]
    extra = {"download": True} if name.may_download else {}
    problem: Exception | None = None
    for arguments in choices:
        try:
            dataset = build(**arguments, **extra)
        except Exception as error:
            problem = problem or error
            continue
        bound = inspect.signature(build).bind(**arguments)
        bound.apply_defaults()
        shown = {key: value for key, value in bound.arguments.items() if key in parameters}
        shown.pop("download", None)
        return dataset, {**shown, **arguments}
    lines = str(problem).splitlines() or [type(problem).__name__]
    hint = "" if name.may_download else " (nothing is downloaded without download=true)"
    raise DataError(f"data: {name.spec!r} cannot be opened: {lines[0]}{hint}") from problem


def _value(text: str, annotation: Any) -> Any:
    """Parse an argument: a string if annotated so, else a Boolean, a number or a tuple."""
    if annotation is not None and annotation is not inspect.Parameter.empty:
        shown = annotation if isinstance(annotation, str) else str(annotation)
        if annotation is str or "str" in shown.replace("'", ""):
            return text
    if text in ("true", "false"):
        return text == "true"
    if "," in text:
        return tuple(_value(part, None) for part in text.split(","))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _class_names(dataset: Any) -> list[str]:
    """Return the class names, if unique: for ImageNet the WordNet ids, as its words are not."""
    for attribute in ("wnids", "classes"):
        names = getattr(dataset, attribute, None)
        if isinstance(names, (list, tuple)) and names:
            shown = [", ".join(n) if isinstance(n, (list, tuple)) else str(n) for n in names]
            if len(set(shown)) == len(shown):
                return shown
    return []


def _pair(item: Any, i: int, source: str) -> tuple[Any, Any]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        came = f"{len(item)} values" if isinstance(item, (tuple, list)) else type(item).__name__
        raise DataError(f"data: item {i} of {source} must be an image and a label, got {came}")
    return item[0], item[1]


def _files(dataset: Any, n: int) -> list[tuple[Path, int]] | None:
    """Return the image files and labels of a data set, if it stores them as others do.

    Accepted only if the first, the middle and the last item equal the content of their files.
    """
    for pairs in (
        getattr(dataset, "samples", None),
        getattr(dataset, "_samples", None),
        _zipped(dataset, "_image_files"),
        _zipped(dataset, "_images"),
    ):
        try:
            found = [(Path(path), int(label)) for path, label in pairs or []]
            if (
                len(found) == n
                and n
                and all(_agree(dataset[i], found[i]) for i in {0, n // 2, n - 1})
            ):
                return found
        except (TypeError, ValueError, OSError, DataError):
            continue
    return None


def _zipped(dataset: Any, files: str) -> list[tuple[Any, Any]] | None:
    paths, labels = getattr(dataset, files, None), getattr(dataset, "_labels", None)
    if paths is None or labels is None or len(paths) != len(labels):
        return None
    return list(zip(paths, labels, strict=True))


def _agree(item: Any, file: tuple[Path, int]) -> bool:
    from PIL import Image

    with Image.open(file[0]) as image:
        pixels = pixels_of(image, str(file[0]))
    expected = pixels_of(item[0], "item")
    if pixels.shape[:2] != expected.shape[:2] or int(item[1]) != file[1]:
        return False
    return bool((np.broadcast_to(pixels, expected.shape) == expected).all())
