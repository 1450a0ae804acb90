"""Files of statistics, written and read in pieces; in shards, in float32 or bfloat16.

A file is a safetensors file with arrays `packed:NAME`, `rows:NAME` and `sums:NAME`, a header in its
metadata, and a digest of both. Sharded statistics are several such files, each of some parameters,
and a JSON index that lists them.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastsal._core as _core
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.fisher.checks import check_block_size, check_precision, check_shapes
from fastsal.fisher.model_sums import ModelSums, Origin, Shapes
from fastsal.fisher.parts import Part, cut, packed_bytes, uncut
from fastsal.fisher.rows import Array, widened
from fastsal.fisher.storage import Storage
from fastsal.fisher.sums import ParameterSums
from fastsal.utils import safetensors_files
from fastsal.utils.digests import Digest
from fastsal.utils.json_files import read_json, write_json
from fastsal.utils.mapped_files import forget, mapped_base
from fastsal.utils.paths import user_path
from fastsal.utils.safetensors_files import Entry
from fastsal.utils.sizes import parse_bytes

FORMAT = "fastsal.BlockFisher"
VERSION = 1
_INDEX = "fastsal.BlockFisher.index"
_CODES = {np.dtype("float32"): "F32", np.dtype("float64"): "F64", np.dtype("uint16"): "BF16"}
# Bytes read, rounded and written at a time.
_PIECE = 2**25
# Half a unit in the last of 8 significant bits.
_BFLOAT16_ERROR = 2.0**-8

# summed(name): the sums of a parameter, computed when they are written.
Summed = Callable[[str], ParameterSums]


def write(
    sums: ModelSums,
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shard_bytes: int | str | None = None,
    summed: Summed | None = None,
) -> None:
    """Write statistics to a file, or to shards and an index; see `BlockFisher.save`.

    Args:
        sums: The statistics.
        path: The file, or the index.
        dtype: None, `"float32"` or `"bfloat16"`.
        shard_bytes: Most bytes of a shard; None writes one file.
        summed: Returns the sums of a parameter; None takes them from `sums`.

    Raises:
        InvalidArgument: An argument is invalid.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise InvalidArgument(f"dtype must be None, 'float32' or 'bfloat16', got {dtype!r}")
    if dtype is not None and sums.precision != "float32":
        raise InvalidArgument(f"dtype must be None for {sums.precision} sums, got {dtype!r}")
    summed = summed or sums.parameters.__getitem__

    def write_some(target: str | os.PathLike[str], names: Sequence[str]) -> None:
        header = _header(sums, names)
        entries = _entries(names, summed, dtype, sums.storage)
        safetensors_files.write(target, header, entries, _digest_of(header))

    if shard_bytes is None:
        write_some(path, list(sums.parameters))
        return
    most = parse_bytes(shard_bytes, "shard_bytes")

    def cost(part: Part) -> int:
        return packed_bytes(part, sums.block_size, sums.itemsize)

    groups = cut(sums.shapes, None, cost, most) or [[p] for p in uncut(sums.shapes)]
    target = user_path(path)
    names = []
    for number, group in enumerate(groups, start=1):
        name = shard_name(target, number, len(groups))
        write_some(target.parent / name, [part.name for part in group])
        names.append(name)
    write_index(target, names, list(sums.parameters))


def shard_name(path: Path, number: int, count: int) -> str:
    """Return the file name of shard `number` of `count`, from 1, of an index."""
    return f"{path.stem}-{number:05d}-of-{count:05d}.safetensors"


def write_index(path: str | os.PathLike[str], shards: Sequence[str], names: Sequence[str]) -> None:
    """Write the index of shards in the same folder.

    Args:
        path: The index.
        shards: File names of the shards.
        names: Parameters of all shards, in order.
    """
    index = {
        "format": _INDEX,
        "version": VERSION,
        "parameters": list(names),
        "shards": list(shards),
    }
    write_json(path, index)


def read(path: str | os.PathLike[str], *, verify: bool = True) -> ModelSums:
    """Read statistics that `write` wrote; see `BlockFisher.load`.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is truncated, modified, or not a file of statistics.
    """
    path = user_path(path)
    shown = repr(os.fspath(path))
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {shown}")
    try:
        index = _index(path)
        if index is None:
            return _read_file(path, verify=verify)
        shards = [path.parent / name for name in index["shards"]]
        return _joined([_read_file(shard, verify=verify) for shard in shards], index["parameters"])
    except FileFormatError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise FileFormatError(f"path: {shown} cannot be read as {FORMAT}: {error}") from error


def _header(sums: ModelSums, names: Iterable[str]) -> dict[str, Any]:
    shapes = sums.shapes
    header = {
        "format": FORMAT,
        "version": VERSION,
        "block_size": sums.block_size,
        "precision": sums.precision,
        "samples": sums.samples,
        "rows_seen": sums.rows_seen,
        "steps": sums.steps,
        "shapes": {name: list(shapes[name]) for name in names},
    }
    if sums.stored_error:
        header["stored_error"] = sums.stored_error
    if sums.origin is not None:
        parts = sums.origin.parts
        header["parts"] = {
            n: [parts[n].name, parts[n].start, parts[n].stop, parts[n].size] for n in names
        }
        header["whole"] = {name: list(shape) for name, shape in sums.origin.shapes.items()}
    return header


def _entries(
    names: Iterable[str], summed: Summed, dtype: str | None, storage: Storage
) -> list[Entry]:
    found = []
    for name in names:
        p = summed(name)
        found.append(_entry(f"sums:{name}", p.sums, None, storage))
        if p.packed is None:
            found.append(_entry(f"rows:{name}", p.gradients(), None, storage))
        else:
            found.append(_entry(f"packed:{name}", p.packed, dtype, storage))
    return found


def _entry(key: str, array: Array, dtype: str | None, storage: Storage) -> Entry:
    code = {"bfloat16": "BF16", "float32": "F32", None: _CODES[array.dtype]}[dtype]
    flat = array.reshape(-1)

    def pieces() -> Iterator[Array]:
        step = _PIECE // array.itemsize
        for start in range(0, len(flat), step):
            piece = flat[start : start + step]
            if dtype == "bfloat16" and piece.dtype == np.float32:
                piece = torch.from_numpy(piece.copy()).bfloat16().view(torch.uint16).numpy()
            elif dtype == "float32" and piece.dtype == np.uint16:
                piece = widened(piece)
            yield piece
            storage.release()

    return Entry(key, code, array.shape, pieces)


def _digest_of(header: Mapping[str, Any]) -> Digest:
    return Digest().json(header)


def _index(path: Path) -> dict[str, Any] | None:
    """Return an index whose shards exist; None for a file of statistics."""
    with path.open("rb") as file:
        first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if length <= path.stat().st_size or not first.startswith(b"{"):
        return None
    index: dict[str, Any] = read_json(path)
    if index.get("format") != _INDEX or index.get("version") != VERSION or not index["shards"]:
        raise FileFormatError(f"path: {os.fspath(path)!r} is not an index of {FORMAT}")
    for name in index["shards"]:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise FileFormatError(
                f"path: {os.fspath(path)!r} must list shards in its own folder, got {name!r}"
            )
        if not (path.parent / name).is_file():
            raise FileFormatError(
                f"path: {os.fspath(path)!r} lists the shard {name}, which is missing"
            )
    return index


def _read_file(path: str | os.PathLike[str], *, verify: bool) -> ModelSums:
    header, arrays = safetensors_files.read_mapped(path, FORMAT, VERSION)
    digest = header.pop("digest")
    if verify:
        _verify(path, header, arrays, digest)
    check_shapes(header["shapes"])
    block_size = check_block_size(header["block_size"])
    precision = check_precision(header["precision"])
    for name, shape in header["shapes"].items():
        # Before memory of the size that the header names is allocated.
        _expect(arrays, f"sums:{name}", (math.prod(shape),), np.dtype(precision))
    sums = ModelSums.empty(header["shapes"], block_size, precision)
    for name, p in sums.parameters.items():
        p.sums = np.array(_expect(arrays, f"sums:{name}", (p.d,), p.dtype))
        if f"packed:{name}" in arrays:
            length = _core.packed_len(p.d, p.block_size)
            is_rounded = arrays[f"packed:{name}"].dtype == np.uint16
            dtype = np.dtype(np.uint16) if is_rounded else p.dtype
            p.packed = _expect(arrays, f"packed:{name}", (length,), dtype)
        else:
            p.rows = [_expect(arrays, f"rows:{name}", (None, p.d), p.dtype)]
    sums.samples = float(header["samples"])
    sums.rows_seen = int(header["rows_seen"])
    sums.steps = int(header["steps"])
    sums.stored_error = float(header.get("stored_error", 0.0))
    if any(array.dtype == np.uint16 for array in arrays.values()):
        sums.stored_error = max(sums.stored_error, _BFLOAT16_ERROR)
    # All arrays are in one map, which any of them refers to.
    sums.storage.mapped = [a for a in arrays.values() if mapped_base(a) is not None][:1]
    if "parts" in header:
        parts = {key: Part(*given) for key, given in header["parts"].items()}
        shapes = {name: tuple(shape) for name, shape in header["whole"].items()}
        sums.origin = Origin(parts, shapes)
    return sums


def _verify(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    arrays: Mapping[str, Array],
    expected: str,
) -> None:
    """Raise FileFormatError unless a file has the digest that was written into it."""
    digest = _digest_of(header)
    for key, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        name, _ = safetensors_files.DTYPES[_CODES[array.dtype]]
        digest.update(f"{key}\0{name}\0".encode())
        flat = array.reshape(-1)
        for start in range(0, len(flat), _PIECE // array.itemsize):
            digest.update(flat[start : start + _PIECE // array.itemsize].view(np.uint8).data)
            forget([array])
    if digest.hexdigest() != expected:
        raise FileFormatError(f"path: {os.fspath(path)!r} was modified after it was written")


def _joined(shards: Sequence[ModelSums], names: Sequence[str]) -> ModelSums:
    """Return the statistics of a model from those of its shards."""
    first = shards[0]
    same = ("block_size", "precision", "samples", "rows_seen", "steps")
    for shard in shards:
        if any(getattr(shard, name) != getattr(first, name) for name in same):
            raise FileFormatError("path: the shards are of different statistics")
    if first.origin is None:
        held = {n: p for shard in shards for n, p in shard.parameters.items()}
        if len(held) != sum(len(shard.parameters) for shard in shards):
            raise FileFormatError("path: a parameter is duplicated in several shards")
    else:
        held = _whole_parameters(shards, first.origin.shapes)
    if set(held) != set(names):
        raise FileFormatError("path: the shards do not hold the parameters of their index")
    return ModelSums(
        first.block_size,
        first.precision,
        {name: held[name] for name in names},
        samples=first.samples,
        rows_seen=first.rows_seen,
        steps=first.steps,
        stored_error=max(shard.stored_error for shard in shards),
        storage=Storage(mapped=[array for shard in shards for array in shard.storage.mapped]),
    )


def _whole_parameters(shards: Sequence[ModelSums], shapes: Shapes) -> dict[str, ParameterSums]:
    """Return parameters from parts that ranks wrote; only those that were cut are copied."""
    found: dict[str, list[tuple[Part, ParameterSums]]] = {name: [] for name in shapes}
    for shard in shards:
        for key, part in (shard.origin.parts if shard.origin else {}).items():
            found[part.name].append((part, shard.parameters[key]))
    held = {}
    for name, shape in shapes.items():
        parts = sorted(found[name], key=lambda item: item[0].start)
        ends = [part.stop for part, _ in parts]
        if (
            not parts
            or [p.start for p, _ in parts] != [0, *ends[:-1]]
            or ends[-1] != parts[0][0].size
        ):
            raise FileFormatError(f"path: the shards do not hold all of {name!r}")
        some = [p for _, p in parts]
        if len(some) == 1:
            held[name] = some[0]
            continue
        joined = ParameterSums(
            tuple(shape),
            max(p.block_size for p in some),
            some[0].dtype,
            np.concatenate([p.sums for p in some]),
        )
        if all(p.packed is not None for p in some):
            packed = [widened(p.packed) for p in some if p.packed is not None]
            joined.packed = np.concatenate(packed)
        else:
            joined.rows = [np.concatenate([p.gradients() for p in some], axis=1)]
        held[name] = joined
    return held


def _expect(
    arrays: Mapping[str, Array],
    key: str,
    shape: tuple[int | None, ...],
    dtype: np.dtype[Any],
) -> Array:
    """Return an array of a file, or raise FileFormatError if its shape or type is wrong."""
    array = arrays[key]
    fits = len(array.shape) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        raise FileFormatError(
            f"path: {key!r} must be {dtype} {shape}, as the header says, got {array.dtype} "
            f"{array.shape}"
        )
    return array
