"""Statistics on disk: written and read piece by piece, in shards, in float32 or bfloat16.

A file is safetensors with arrays `packed:NAME`, `rows:NAME` and `sums:NAME`, a header in its
metadata, and a digest of both. Statistics in shards are several such files, each of some
parameters, and an index in JSON that names them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastsal._core as _core
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.fisher.parts import Part, cut, packed_bytes, whole
from fastsal.fisher.sums import ParameterStatistics, widened
from fastsal.utils import safetensors_files as streamed_files
from fastsal.utils.atomic import write_text
from fastsal.utils.mapped_files import give_back
from fastsal.utils.safetensors_files import Entry
from fastsal.utils.sizes import parse_bytes

if TYPE_CHECKING:
    from fastsal.fisher.block_fisher import BlockFisher

FORMAT = "fastsal.BlockFisher"
VERSION = 1
_INDEX = "fastsal.BlockFisher.index"
_DTYPES = {"F32": "float32", "F64": "float64", "BF16": "bfloat16"}
_CODES = {np.dtype("float32"): "F32", np.dtype("float64"): "F64", np.dtype("uint16"): "BF16"}
# Bytes that are read, rounded and written at a time.
_PIECE = 2**25
_BFLOAT16_ERROR = 2.0**-9

Array = NDArray[Any]


def write(
    fisher: BlockFisher,
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shard_bytes: int | str | None = None,
) -> None:
    """Write statistics to a file, or to shards and an index; see `BlockFisher.save`."""
    if dtype not in (None, "float32", "bfloat16"):
        raise InvalidArgument(f"dtype: got {dtype!r}; takes None, 'float32' or 'bfloat16'")
    if dtype is not None and fisher.precision != "float32":
        raise InvalidArgument(f"dtype: got {dtype!r} for {fisher.precision} sums; takes None")
    if shard_bytes is None:
        _write_file(path, _header(fisher, fisher.names), _entries(fisher, fisher.names, dtype))
        return
    most = parse_bytes(shard_bytes, "shard_bytes")

    def cost(part: Part) -> int:
        return packed_bytes(part, fisher.block_size, fisher._itemsize)

    groups = cut(fisher.shapes, None, cost, most) or [[p] for p in whole(fisher.shapes)]
    target = Path(path)
    names = []
    for number, group in enumerate(groups, start=1):
        held = [part.name for part in group]
        name = f"{target.stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(target.parent / name, _header(fisher, held), _entries(fisher, held, dtype))
        names.append(name)
    write_index(target, names, fisher.names)


def write_index(path: str | os.PathLike[str], shards: Sequence[str], names: Sequence[str]) -> None:
    """Write the index of shards that lie beside it, of parameters of these names."""
    index = {
        "format": _INDEX,
        "version": VERSION,
        "parameters": list(names),
        "shards": list(shards),
    }
    write_text(path, json.dumps(index, indent=1) + "\n")


def read(path: str | os.PathLike[str], *, verify: bool = True) -> BlockFisher:
    """Read what `write` wrote; see `BlockFisher.load`."""
    shown = repr(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path: there is no file {shown}")
    try:
        index = _index(Path(path))
        if index is None:
            return _read_file(path, verify=verify)
        shards = [Path(path).parent / name for name in index["shards"]]
        return _joined([_read_file(shard, verify=verify) for shard in shards], index["parameters"])
    except FileFormatError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise FileFormatError(f"path: {shown} cannot be read as {FORMAT}: {error}") from error


def _header(fisher: BlockFisher, names: Iterable[str]) -> dict[str, Any]:
    header = {
        "format": FORMAT,
        "version": VERSION,
        "block_size": fisher.block_size,
        "precision": fisher.precision,
        "samples": fisher._samples,
        "rows_seen": fisher._rows_seen,
        "steps": fisher._steps,
        "shapes": {name: list(fisher.shapes[name]) for name in names},
    }
    if fisher._stored_error:
        header["stored_error"] = fisher._stored_error
    if fisher._shares is not None:
        parts = {part.key: part for share in fisher._shares for part in share}
        header["parts"] = {
            n: [parts[n].name, parts[n].start, parts[n].stop, parts[n].size] for n in names
        }
        header["whole"] = {name: list(shape) for name, shape in (fisher._whole or {}).items()}
    return header


def _entries(fisher: BlockFisher, names: Iterable[str], dtype: str | None) -> list[Entry]:
    found = []
    for name in names:
        p = fisher._sums_of(name)
        found.append(_entry(f"sums:{name}", p.sums, None, fisher))
        if p.packed is None:
            found.append(_entry(f"rows:{name}", p.gradients(), None, fisher))
        else:
            found.append(_entry(f"packed:{name}", p.packed, dtype, fisher))
    return found


def _entry(key: str, array: Array, dtype: str | None, fisher: BlockFisher) -> Entry:
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
            fisher._release()

    return Entry(key, code, array.shape, pieces)


def _write_file(
    path: str | os.PathLike[str], header: Mapping[str, Any], entries: Sequence[Entry]
) -> None:
    streamed_files.write(path, header, entries, _begun(header))


def _begun(header: Mapping[str, Any]) -> Any:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode())


def _index(path: Path) -> dict[str, Any] | None:
    """An index, whose shards are there; None for a file of statistics."""
    with path.open("rb") as file:
        first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if length <= path.stat().st_size or not first.startswith(b"{"):
        return None
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if index.get("format") != _INDEX or index.get("version") != VERSION or not index["shards"]:
        raise FileFormatError(f"path: {os.fspath(path)!r} is no index of {FORMAT}")
    for name in index["shards"]:
        if not (path.parent / name).is_file():
            raise FileFormatError(f"path: {os.fspath(path)!r} names {name}, not beside it")
    return index


def _read_file(path: str | os.PathLike[str], *, verify: bool) -> BlockFisher:
    from fastsal.fisher.block_fisher import BlockFisher

    shown = repr(os.fspath(path))
    header, arrays, told = _mapped(Path(path), shown)
    if verify:
        digest = _begun(header)
        for key, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
            digest.update(f"{key}\0{_DTYPES[_CODES[array.dtype]]}\0".encode())
            flat = array.reshape(-1)
            for start in range(0, len(flat), _PIECE // array.itemsize):
                digest.update(flat[start : start + _PIECE // array.itemsize].view(np.uint8).data)
                forget([array])
        if digest.hexdigest() != told:
            raise FileFormatError(f"path: {shown} was changed after it was written")
    fisher = BlockFisher(
        header["shapes"], block_size=header["block_size"], precision=header["precision"]
    )
    for name, p in fisher._parameters.items():
        p.sums = np.array(_expect(arrays, f"sums:{name}", (p.d,), p.dtype))
        if f"packed:{name}" in arrays:
            length = _core.packed_len(p.d, p.block_size)
            rounded = arrays[f"packed:{name}"].dtype == np.uint16
            dtype = np.dtype(np.uint16) if rounded else p.dtype
            p.packed = _expect(arrays, f"packed:{name}", (length,), dtype)
        else:
            p.rows = [_expect(arrays, f"rows:{name}", (None, p.d), p.dtype)]
    fisher._samples = float(header["samples"])
    fisher._rows_seen = int(header["rows_seen"])
    fisher._steps = int(header["steps"])
    fisher._stored_error = float(header.get("stored_error", 0.0))
    if any(array.dtype == np.uint16 for array in arrays.values()):
        fisher._stored_error = max(fisher._stored_error, _BFLOAT16_ERROR)
    # All arrays lie in one map; one of them stands for it.
    fisher._mapped = [array for array in arrays.values() if _base(array) is not None][:1]
    if "parts" in header:
        fisher._stored_parts = {key: Part(*given) for key, given in header["parts"].items()}
        fisher._whole = {name: tuple(shape) for name, shape in header["whole"].items()}
    return fisher


def _mapped(path: Path, shown: str) -> tuple[dict[str, Any], dict[str, Array], str]:
    """The header of a file, its arrays (memory-mapped, read only) and its digest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > size - 8:
            raise FileFormatError(f"path: {shown} is truncated, or no safetensors file")
        tensors = json.loads(file.read(length))
        metadata = tensors.pop("__metadata__", None) or {}
        header = json.loads(metadata.get("fastsal", "{}"))
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise FileFormatError(f"path: {shown} holds no {FORMAT} of version {VERSION}")
        told = header.pop("digest")
        data = 8 + length
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size > data else b""
    end = 0
    arrays: dict[str, Array] = {}
    for key, info in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        dtype = np.dtype("uint16" if info["dtype"] == "BF16" else _DTYPES[info["dtype"]])
        count = int(np.prod(info["shape"], dtype=np.int64))
        if start != end or stop - start != count * dtype.itemsize or data + stop > size:
            raise FileFormatError(f"path: {shown} is truncated, or its header is damaged")
        array: Array = (
            np.frombuffer(memory, dtype, count, data + start) if count else np.empty(0, dtype)
        )
        arrays[key] = array.reshape(info["shape"])
        end = stop
    if data + end != size:
        raise FileFormatError(f"path: {shown} is longer than its header says")
    return header, arrays, told


def forget(arrays: Iterable[Array]) -> None:
    """Give back the memory of mapped files that was touched; they are read again when used."""
    maps = {id(base): base for array in arrays if (base := _base(array)) is not None}
    for base in maps.values():
        give_back(base)


def _base(array: Array) -> mmap.mmap | None:
    """The mapped file that an array lies in."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def _joined(shards: Sequence[BlockFisher], names: Sequence[str]) -> BlockFisher:
    """One model's statistics from those of its shards."""
    from fastsal.fisher.block_fisher import BlockFisher

    first = shards[0]
    same = ("block_size", "precision", "_samples", "_rows_seen", "_steps")
    for shard in shards:
        if any(getattr(shard, name) != getattr(first, name) for name in same):
            raise FileFormatError("path: the shards are not of the same statistics")
    if first._stored_parts is None:
        shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
        if len(shapes) != sum(len(shard.names) for shard in shards):
            raise FileFormatError("path: a parameter stands in several shards")
        held = {n: p for shard in shards for n, p in shard._parameters.items()}
    else:
        shapes = dict(first._whole or {})
        held = _whole_parameters(shards, shapes)
    if set(shapes) != set(names):
        raise FileFormatError("path: the shards do not hold the parameters of their index")
    fisher = BlockFisher(
        {name: shapes[name] for name in names},
        block_size=first.block_size,
        precision=first.precision,
    )
    fisher._parameters = {name: held[name] for name in names}
    fisher._samples, fisher._rows_seen = first._samples, first._rows_seen
    fisher._steps = first._steps
    fisher._stored_error = max(shard._stored_error for shard in shards)
    fisher._mapped = [array for shard in shards for array in shard._mapped]
    return fisher


def _whole_parameters(
    shards: Sequence[BlockFisher], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ParameterStatistics]:
    """Parameters of which ranks wrote parts; only those that were cut are copied into memory."""
    found: dict[str, list[tuple[Part, ParameterStatistics]]] = {name: [] for name in shapes}
    for shard in shards:
        for key, part in (shard._stored_parts or {}).items():
            found[part.name].append((part, shard._parameters[key]))
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
        whole = ParameterStatistics(
            tuple(shape),
            max(p.block_size for p in some),
            some[0].dtype,
            np.concatenate([p.sums for p in some]),
        )
        if all(p.packed is not None for p in some):
            whole.packed = np.concatenate([widened(p.packed) for p in some if p.packed is not None])
        else:
            whole.rows = [np.concatenate([p.gradients() for p in some], axis=1)]
        held[name] = whole
    return held


def _expect(
    arrays: Mapping[str, Array],
    key: str,
    shape: tuple[int | None, ...],
    dtype: np.dtype[Any],
) -> Array:
    array = arrays[key]
    fits = len(array.shape) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        raise FileFormatError(
            f"path: {key!r} is {array.dtype} {array.shape}; the header says {dtype} {shape}"
        )
    return array
