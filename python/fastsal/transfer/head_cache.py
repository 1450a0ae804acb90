"""Store fitted heads on disk, keyed by the content of model and images, and by settings.

A file is safetensors with a digest of its content: a file that is truncated, modified or of another
version is rejected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsal.data.content import content_of
from fastsal.data.image_set import ImageSet
from fastsal.data.unpacking import BatchRule, ruled, unpacked
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.digest import model_digest
from fastsal.models.inputs import InputSpec
from fastsal.transfer.knn import KnnHead
from fastsal.transfer.linear_head import Head
from fastsal.transfer.own import OwnHead
from fastsal.transfer.tasks import Split
from fastsal.utils.atomic import atomic_path
from fastsal.utils.digests import Digest
from fastsal.utils.paths import user_path
from fastsal.utils.safetensors_files import header_of, metadata_of
from fastsal.utils.warn import warn_user

__all__ = ["HeadCache", "load_head", "model_digest", "save_head", "split_digest"]

_FORMAT = "fastsal head"
# Part of every key: heads of another version are not found.
_VERSION = 1
# Version of what features are, the input of the layer that produces the output.
_FEATURES = 2


class HeadCache:
    """A folder of fitted heads for `fit_heads`; several processes may share it.

    Args:
        folder: Folder of the files; created with the first head.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = user_path(folder)

    def __repr__(self) -> str:
        return f"HeadCache({str(self.folder)!r})"

    def key(
        self,
        model: str,
        fit: Split,
        spec: InputSpec,
        kind: str,
        settings: Mapping[str, Any],
        batch: BatchRule | None = None,
    ) -> str:
        """Return the SHA-256, in hex, of everything that a head depends on.

        Args:
            model: Digest from `model_digest`.
            fit: Images that the head is fitted on.
            spec: Preprocessing of the images.
            kind: Kind of head, one of `HEAD_KINDS`.
            settings: Settings of this kind.
            batch: Function from a batch of `fit` to `(images, labels)`, if it is no `ImageSet`.
        """
        images = split_digest(fit, batch)
        inputs = [_VERSION, _FEATURES, model, images, asdict(spec), kind, dict(settings)]
        return Digest().json(inputs).hexdigest()

    def path(self, key: str) -> Path:
        """Return the path of the file of a key."""
        return self.folder / f"{key[:40]}.safetensors"

    def get(self, key: str) -> Head | KnnHead | None:
        """Return the head stored under `key`, bit for bit; None if there is none.

        A damaged file is ignored with a warning.
        """
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            head, note = _read(path)
            if note != key:
                raise FileFormatError(f"{str(path)!r} holds the head of another key")
        except FileFormatError as error:
            warn_user(f"cache: {error}; the head is fitted again")
            return None
        return head

    def put(self, key: str, head: Head | KnnHead | OwnHead) -> None:
        """Store a head under `key`, atomically.

        Raises:
            InvalidArgument: The head is the model's own, which has no tensors to store.
            OSError: The folder cannot be written.
        """
        _write(self.path(key), head, key)


def save_head(path: str | os.PathLike[str], head: Head | KnnHead | OwnHead) -> None:
    """Write a head to a safetensors file, atomically.

    Raises:
        InvalidArgument: The head is the model's own, which has no tensors to store.
        OSError: The file cannot be written.
    """
    _write(Path(path), head, "")


def load_head(path: str | os.PathLike[str]) -> Head | KnnHead:
    """Read a head written by `save_head`.

    Raises:
        FileNotFoundError: The file does not exist.
        FileFormatError: The file is truncated, modified or not a head.
    """
    path = user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: {os.fspath(path)!r} does not exist")
    return _read(path)[0]


def split_digest(split: Split, batch: BatchRule | None = None) -> str:
    """Return the SHA-256, in hex, of the images and labels of a split.

    Image files count by their content, not by their names or times.
    """
    digest = Digest()
    if not isinstance(split, ImageSet):
        for images, labels in unpacked(ruled(split, batch)):
            digest.tensor("images", images).tensor("labels", labels)
        return digest.hexdigest()
    return digest.text(content_of(split)).hexdigest()


def _write(path: Path, head: Head | KnnHead | OwnHead, note: str) -> None:
    from safetensors.torch import save_file

    if isinstance(head, OwnHead):
        raise InvalidArgument(
            "head must be a fitted head, got the model's own, which has no tensors to store"
        )
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
        save_file(tensors, temporary, metadata=metadata_of(header))


def _read(path: Path) -> tuple[Head | KnnHead, str]:
    """Return a head and the key stored with it."""
    from safetensors import SafetensorError, safe_open

    shown = repr(os.fspath(path))
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = header_of(file.metadata())
            if header.get("format") != _FORMAT or header.get("version") != _VERSION:
                raise FileFormatError(f"path: {shown} is not a head file of version {_VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _digest(header, tensors) != header["digest"]:
                raise FileFormatError(f"path: {shown} was modified after it was written")
        given = header["spec"]
        size = given["size"]
        spec = InputSpec(
            **{
                **given,  # files of earlier versions have no crop
                "size": None if size is None else (size[0], size[1]),
                "mean": tuple(given["mean"]),
                "std": tuple(given["std"]),
            }
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
    facts = {name: value for name, value in header.items() if name != "digest"}
    digest = Digest().json(facts)
    for name in sorted(tensors):
        digest.tensor(name, tensors[name])
    return digest.hexdigest()
