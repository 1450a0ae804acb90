"""Heads on disk, found again by what they were fitted on and how.

A file is safetensors with a digest of all that it holds: one that is truncated, changed or of
another version is refused, never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.data.image_set import ImageSet
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.transfer.knn import KnnHead
from fastsal.transfer.linear_head import Head
from fastsal.transfer.own import OwnHead
from fastsal.transfer.tasks import Part
from fastsal.utils.atomic import atomic_path
from fastsal.utils.warn import warn_user

_FORMAT = "fastsal head"
# Also part of every key: a new way to fit or to write a head makes old files unfindable.
_VERSION = 1


class HeadCache:
    """A folder of heads; see `fit_heads`. Several processes may share it.

    Args:
        folder: made when the first head is kept.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"HeadCache({str(self.folder)!r})"

    def key(
        self, model: str, fit: Part, spec: InputSpec, kind: str, settings: Mapping[str, Any]
    ) -> str:
        """Return the SHA-256, in hex, of all that a head depends on.

        Args:
            model: from `model_digest`.
            fit: the images that it is fitted on.
            spec: how they are prepared.
            kind: of head.
            settings: of this kind.
        """
        parts = [_VERSION, model, part_digest(fit), asdict(spec), kind, dict(settings)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key[:40]}.safetensors"

    def get(self, key: str) -> Head | KnnHead | None:
        """Return the head that was kept under `key`, bit by bit; None if there is none.

        A damaged file counts as none, with a warning.
        """
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            head, note = _read(path)
            if note != key:
                raise FileFormatError(f"path: {str(path)!r} holds the head of another key")
        except FileFormatError as error:
            warn_user(f"cache: {error}; the head is fitted anew")
            return None
        return head

    def put(self, key: str, head: Head | KnnHead | OwnHead) -> None:
        """Keep a head under `key`, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        _write(self.path(key), head, key)


def save_head(path: str | os.PathLike[str], head: Head | KnnHead | OwnHead) -> None:
    """Write a head to a safetensors file, whole or not at all.

    Raises:
        InvalidArgument: an own head, which holds nothing but the model does.
        OSError: the file cannot be written.
    """
    _write(Path(path), head, "")


def load_head(path: str | os.PathLike[str]) -> Head | KnnHead:
    """Read what `save_head` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is truncated, changed, or something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path: there is no file {os.fspath(path)!r}")
    return _read(Path(path))[0]


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256, in hex, of a model's parameters and buffers and of its modules.

    Modules count by name, type and the settings that they print (strides, slopes), so the same
    weights in another network give another digest.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        # Addresses of functions and objects differ from run to run.
        told = re.sub(r" at 0x[0-9a-fA-F]+", "", module.extra_repr())
        kind = type(module).__qualname__
        digest.update(f"{name}\0{kind}\0{told}\0".encode())
    for kind, tensors in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in tensors:
            _add_tensor(digest, f"{kind} {name}", tensor)
    return digest.hexdigest()


def part_digest(part: Part) -> str:
    """Return the SHA-256, in hex, of the images and labels of a part.

    Of files, their names within the source, sizes and times of change stand for what they hold.
    """
    digest = hashlib.sha256()
    if not isinstance(part, ImageSet):
        for images, labels in part:
            _add_tensor(digest, "images", images)
            _add_tensor(digest, "labels", labels)
        return digest.hexdigest()
    digest.update(json.dumps(part.classes).encode())
    digest.update(np.ascontiguousarray(part.y).tobytes())
    if isinstance(part.x, tuple):
        for file in part.x:
            status = file.stat()
            inside = file.is_relative_to(part.source)
            name = file.relative_to(part.source) if inside else Path(file.parent.name, file.name)
            digest.update(f"{name.as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    else:
        digest.update(f"{part.x.dtype} {part.x.shape}".encode())
        digest.update(np.ascontiguousarray(part.x).data)
    return digest.hexdigest()


def _add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous()
    digest.update(f"{name}\0{values.dtype}\0{list(values.shape)}\0".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)


def _write(path: Path, head: Head | KnnHead | OwnHead, note: str) -> None:
    from safetensors.torch import save_file

    if isinstance(head, OwnHead):
        raise InvalidArgument("head: got the model's own, which is kept with the model")
    if isinstance(head, KnnHead):
        tensors = {"bank": head.bank, "labels": head.labels}
        facts: dict[str, Any] = {"kind": "knn", "k": head.k, "temperature": head.temperature}
    else:
        tensors = {"weight": head.weight, "bias": head.bias}
        facts = {"kind": head.kind, "alpha": head.alpha}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "note": note,
        "task": head.task,
        "classes": list(head.classes),
        "scale": head.scale,
        "spec": json.loads(json.dumps(asdict(head.spec))),
        **facts,
    }
    header["digest"] = _digest(header, tensors)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"fastsal": json.dumps(header)})


def _read(path: Path) -> tuple[Head | KnnHead, str]:
    """Return the head and the note that stands beside it."""
    from safetensors import SafetensorError, safe_open

    shown = repr(os.fspath(path))
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("fastsal", "{}"))
            if header.get("format") != _FORMAT or header.get("version") != _VERSION:
                raise FileFormatError(
                    f"path: {shown} holds no head of version {_VERSION} of this format"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _digest(header, tensors) != header["digest"]:
                raise FileFormatError(f"path: {shown} was changed after it was written")
        given = header["spec"]
        spec = InputSpec(
            given["channels"],
            None if given["size"] is None else (given["size"][0], given["size"][1]),
            tuple(given["mean"]),
            tuple(given["std"]),
            given["interpolation"],
        )
        task, classes, scale = header["task"], tuple(header["classes"]), header["scale"]
        if header["kind"] == "knn":
            k, temperature = header["k"], header["temperature"]
            bank, labels = tensors["bank"], tensors["labels"]
            head: Head | KnnHead = KnnHead(
                task, bank, labels, classes, k, temperature, spec, scale
            )  # fmt: skip
        else:
            weight, bias, alpha = tensors["weight"], tensors["bias"], header["alpha"]
            head = Head(task, weight, bias, classes, alpha, spec, scale, header["kind"])
        return head, header["note"]
    except FileFormatError:
        raise
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"path: {shown} cannot be read as a head: {error}") from error


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    told = {name: value for name, value in header.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        _add_tensor(digest, name, tensors[name])
    return digest.hexdigest()
