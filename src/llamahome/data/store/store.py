"""Tokenized rows on disk: shards while they are made, then one folder of memory-mapped arrays with a manifest of checksums.

    <fingerprint>.parts/shard-000017.rows    finished shards; a killed preparation goes on after them
    <fingerprint>/tokens ... manifest.json   the whole, put there by one rename

Invariant: a folder without `.parts` or `.tmp` in its name is whole. Every byte is covered by a checksum per shard, so that damage is found,
and mended by tokenizing that shard again. Cost of opening: one read of everything (CRC-32, above 1 GB/s a processor).
"""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from llamahome.data.store.counts import Counts, counts_from
from llamahome.data.store.packed import Damaged, pack, unpack
from llamahome.data.store.table import COLUMNS, CUMULATIVE, ExampleTable

FORMAT = 1
_MANIFEST = "manifest.json"
_PER = {
    **dict.fromkeys(("tokens", "targets"), "tokens"),
    **dict.fromkeys(("offsets", "rows", "lines", "files"), "examples"),
    **dict.fromkeys(("firsts", "outcomes", "cut_tokens", "cut_targets"), "rows"),
}
"""What each array has an element for."""
Extent = dict[str, tuple[int, int]]
"""By array: the first element of a shard, and the one after its last."""
_PIECE = 1 << 24
"""Bytes that are checked at a time."""


@dataclass(frozen=True)
class Store:
    """An open store."""

    folder: Path
    table: ExampleTable
    counts: Counts
    shards: tuple[dict[str, Any], ...]
    """Of each shard its rows, examples and tokens, and the checksum of its part of every array."""

    def damaged(self) -> list[int]:
        """Numbers of the shards whose bytes are not those that were written; reads everything."""
        extents = _extents(self.shards)
        with ThreadPoolExecutor() as pool:
            sound = pool.map(lambda each: _checksums(self.table, each[1]) == each[0]["checksums"], zip(self.shards, extents, strict=True))
            return [number for number, good in enumerate(sound) if not good]

    def mend(self, number: int, table: ExampleTable) -> bool:
        """Write the shard's part of every array again; False when `table` is not what was there before the damage."""
        extent = _extents(self.shards)[number]
        if {**_sizes(table), "checksums": _checksums_of(_parts(table, extent))} != self.shards[number]:
            return False
        for name, part in _parts(table, extent).items():
            with (self.folder / name).open("r+b") as file:
                file.seek(extent[name][0] * COLUMNS[name].itemsize)
                file.write(part.tobytes())
                file.flush()
                os.fsync(file.fileno())
        return True


def shard_path(parts: Path, number: int) -> Path:
    """Where shard `number` lies while a store is made."""
    return parts / f"shard-{number:06}.rows"


def write_shard(parts: Path, number: int, table: ExampleTable, counts: Counts, *, stamp: str) -> None:
    """Put the shard there, whole or not at all. Raises OSError."""
    final = shard_path(parts, number)
    partial = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(pack(table, counts, stamp=f"{stamp} {number}"))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def read_shard(parts: Path, number: int, paths: tuple[str, ...], *, stamp: str) -> tuple[ExampleTable, Counts] | None:
    """The shard; None when it is not there or damaged."""
    try:
        return unpack(shard_path(parts, number).read_bytes(), paths, stamp=f"{stamp} {number}")
    except (FileNotFoundError, Damaged):
        return None


def merge(parts: Path, folder: Path, count: int, paths: tuple[str, ...], *, stamp: str, about: dict[str, Any]) -> list[int]:
    """Make the store `folder` of shards 0 to count - 1 and remove them; returns the damaged ones, and makes nothing when there are any.

    When the folder is there already, another process was quicker, and its store stays. `about` is what `told_about` gives. Raises OSError.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        shards, counts, damaged = _write_arrays(partial, parts, count, paths, stamp=stamp)
        if damaged:
            return damaged
        content = {"format": FORMAT, "stamp": stamp, "files": len(paths), "about": about, "shards": shards, "counts": counts.as_json()}
        with (partial / _MANIFEST).open("wb") as file:
            file.write(_sealed(content))
            file.flush()
            os.fsync(file.fileno())
        _flush_folder(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / _MANIFEST).exists():
                raise
        _flush_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(parts, ignore_errors=True)
    return []


def told_about(folder: Path) -> dict[str, Any] | None:
    """What was told about a store when it was made; None when there is no sound manifest."""
    try:
        raw = (folder / _MANIFEST).read_bytes()
        content = json.loads(raw)["content"]
        return dict(content["about"]) if raw == _sealed(content) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_store(folder: Path, paths: tuple[str, ...], *, stamp: str) -> Store | None:
    """The store in `folder`; None when there is none, or its manifest or the size of an array is not as it was written."""
    try:
        raw = (folder / _MANIFEST).read_bytes()
        content: dict[str, Any] = json.loads(raw)["content"]
        if raw != _sealed(content) or (content["format"], content["stamp"], content["files"]) != (FORMAT, stamp, len(paths)):
            return None
        shards = tuple(content["shards"])
        whole = _extents(shards)[-1]
        columns = {name: _mapped(folder / name, name, end) for name, (_, end) in whole.items()}
        if any(columns[name][0] for name in CUMULATIVE):
            return None
        return Store(folder, ExampleTable(**columns, paths=paths), counts_from(content["counts"]), shards)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_arrays(
    folder: Path, parts: Path, count: int, paths: tuple[str, ...], *, stamp: str
) -> tuple[list[dict[str, Any]], Counts, list[int]]:
    """Append shard after shard to the arrays; the last result names those that are missing or damaged."""
    shards: list[dict[str, Any]] = []
    total, damaged = Counts(), []
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {name: stack.enter_context((folder / name).open("wb")) for name in COLUMNS}
        for name in CUMULATIVE:
            files[name].write(bytes(COLUMNS[name].itemsize))
        extents = _Extents()
        for number in range(count):
            found = read_shard(parts, number, paths, stamp=stamp)
            if found is None:
                damaged.append(number)
                continue
            table, counts = found
            columns = _parts(table, extents.next(_sizes(table)))
            shards.append({**_sizes(table), "checksums": _checksums_of(columns)})
            for name, column in columns.items():
                files[name].write(column.data)
            total.add(counts)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return shards, total, damaged


class _Extents:
    """From where to where the elements of one shard after the other lie in every array."""

    def __init__(self) -> None:
        self._at = {"rows": 0, "examples": 0, "tokens": 0}

    def next(self, sizes: dict[str, Any]) -> Extent:
        """Those of a shard of so many rows, examples and tokens."""
        before = self._at
        self._at = {kind: before[kind] + sizes[kind] for kind in before}
        return {name: (before[kind] + (name in CUMULATIVE), self._at[kind] + (name in CUMULATIVE)) for name, kind in _PER.items()}


def _extents(shards: Iterable[dict[str, Any]]) -> list[Extent]:
    running = _Extents()
    return [running.next(shard) for shard in shards]


def _sizes(table: ExampleTable) -> dict[str, Any]:
    return {"rows": table.num_rows, "examples": len(table), "tokens": len(table.tokens)}


def _parts(table: ExampleTable, extent: Extent) -> dict[str, NDArray[Any]]:
    """A shard's table as its part of the whole arrays: what counts up goes on from what is before it."""
    before = {"offsets": extent["tokens"][0], "firsts": extent["lines"][0]}
    return {name: column[1:] + before[name] if name in CUMULATIVE else column for name, column in table.columns().items()}


def _checksums_of(parts: dict[str, NDArray[Any]]) -> dict[str, int]:
    return {name: _crc(part) for name, part in parts.items()}


def _checksums(table: ExampleTable, extent: Extent) -> dict[str, int]:
    return {name: _crc(getattr(table, name)[begin:end]) for name, (begin, end) in extent.items()}


def _crc(array: NDArray[Any]) -> int:
    raw, found = array.view(np.uint8), 0
    for begin in range(0, len(raw), _PIECE):
        found = zlib.crc32(raw[begin : begin + _PIECE].data, found)
    return found


def _mapped(path: Path, name: str, count: int) -> NDArray[Any]:
    """The array of a file that must hold exactly `count` elements; ValueError otherwise."""
    if path.stat().st_size != count * COLUMNS[name].itemsize:
        raise ValueError(path)
    return np.asarray(np.memmap(path, COLUMNS[name], "r", shape=(count,))) if count else np.empty(0, COLUMNS[name])


def _sealed(content: dict[str, Any]) -> bytes:
    """The manifest's bytes; any other bytes are damage."""
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode() + b"\n"


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
