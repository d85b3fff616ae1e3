"""Tokenized rows on disk: one file per shard while they are made, then one folder of memory-mapped arrays with a manifest of checksums.

    <fingerprint>.parts/shard-000017.rows    finished shards; a preparation that was killed goes on after them
    <fingerprint>/tokens ... manifest.json   the store, put there by one rename

Invariant: a folder without `.parts` or `.tmp` in its name is complete. A checksum per shard covers every byte, so that damage is found and
repaired by tokenizing that shard again. Opening a store reads all of it once (CRC-32, above 1 GB/s per processor).
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from llamahome import durable
from llamahome.data.store.counts import Counts, counts_from
from llamahome.data.store.table import COLUMNS, CUMULATIVE, ExampleTable
from llamahome.progress_marks import marks

FORMAT = 2
_MANIFEST = "manifest.json"
_PER = {
    **dict.fromkeys(("tokens", "targets"), "tokens"),
    **dict.fromkeys(("offsets", "rows", "lines", "files", "good"), "examples"),
    **dict.fromkeys(("firsts", "outcomes", "cut_tokens", "cut_targets"), "rows"),
}
"""What each array has one element for."""
_KINDS = ("rows", "examples", "tokens")
Extent = dict[str, tuple[int, int]]
"""For each array, the first element of a shard and the one after its last."""
_BLOCK = 1 << 24
"""Bytes that are checked at a time."""
_CRC = struct.Struct("<I")
"""The first bytes of a shard's file: a CRC-32 of the rest, which finds every flip of up to 32 neighbouring bits."""


@dataclass(frozen=True)
class Store:
    """An open store."""

    folder: Path
    table: ExampleTable
    counts: Counts
    shards: tuple[dict[str, Any], ...]
    """The numbers of rows, examples and tokens of each shard, and the checksum of its part of every array."""

    def damaged(self) -> list[int]:
        """Numbers of the shards whose bytes are not those that were written; reads the whole store."""

        def matches(shard: dict[str, Any], extent: Extent) -> bool:
            return bool(shard["checksums"] == {name: _crc(getattr(self.table, name)[begin:end]) for name, (begin, end) in extent.items()})

        with ThreadPoolExecutor() as pool:
            return [number for number, good in enumerate(pool.map(matches, self.shards, _extents(self.shards))) if not good]

    def repair(self, number: int, table: ExampleTable) -> bool:
        """Write the shard's part of every array again; False if `table` is not what was there before the damage."""
        extent = _extents(self.shards)[number]
        if {**_sizes(table), "checksums": _checksums_of(_parts(table, extent))} != self.shards[number]:
            return False
        for name, part in _parts(table, extent).items():
            durable.overwrite(self.folder / name, extent[name][0] * COLUMNS[name].itemsize, part.tobytes())
        return True


def shard_path(parts: Path, number: int) -> Path:
    """The file of shard `number` while a store is made."""
    return parts / f"shard-{number:06}.rows"


def write_shard(parts: Path, number: int, table: ExampleTable, counts: Counts, *, stamp: str) -> None:
    """Write the file of a shard, all of it or nothing: a checksum, a line of JSON with the counts, and the arrays. Raises OSError."""
    arrays = {name: column.view(np.uint8).data for name, column in table.columns().items()}
    head = {"stamp": f"{stamp} {number}", "sizes": {name: len(array) for name, array in arrays.items()}, "counts": counts.as_json()}
    content = b"".join((json.dumps(head).encode(), b"\n", *arrays.values()))
    with durable.replacing(shard_path(parts, number)) as file:
        file.write(_CRC.pack(zlib.crc32(content)))
        file.write(content)


def read_shard(parts: Path, number: int, paths: tuple[str, ...], *, stamp: str) -> tuple[ExampleTable, Counts] | None:
    """The content of a shard's file; None if the file is missing, damaged, or made from other data."""
    try:
        content = shard_path(parts, number).read_bytes()
    except FileNotFoundError:
        return None
    if content[: _CRC.size] != _CRC.pack(zlib.crc32(memoryview(content)[_CRC.size :])):
        return None
    begin = content.index(b"\n", _CRC.size) + 1
    head: dict[str, Any] = json.loads(content[_CRC.size : begin])
    if head["stamp"] != f"{stamp} {number}":
        return None
    marks.advance()
    columns = {}
    for name, dtype in COLUMNS.items():
        columns[name] = np.frombuffer(content, dtype, head["sizes"][name] // dtype.itemsize, begin)
        begin += head["sizes"][name]
    return ExampleTable(**columns, paths=paths), counts_from(head["counts"])


def merge(parts: Path, folder: Path, count: int, paths: tuple[str, ...], *, stamp: str, about: dict[str, Any]) -> list[int]:
    """Make the store `folder` from shards 0 to count - 1 and remove their files; if any are damaged, return them and make nothing.

    If the folder exists, another process was faster, and its store stays. `read_about` returns `about`. Raises OSError.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        shards, counts, damaged = _write_arrays(partial, parts, count, paths, stamp=stamp)
        if damaged:
            return damaged
        content = {"format": FORMAT, "stamp": stamp, "files": len(paths), "about": about, "shards": shards, "counts": counts.as_json()}
        durable.write(partial / _MANIFEST, _manifest(content))
        durable.flush_folder(partial)
        try:
            durable.rename(partial, folder)
        except OSError:
            if not (folder / _MANIFEST).exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(parts, ignore_errors=True)
    return []


def read_about(folder: Path) -> dict[str, Any] | None:
    """The `about` that `merge` wrote for a store; None if its manifest is missing or damaged."""
    try:
        raw = (folder / _MANIFEST).read_bytes()
        content = json.loads(raw)["content"]
        return dict(content["about"]) if raw == _manifest(content) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_store(folder: Path, paths: tuple[str, ...], *, stamp: str) -> Store | None:
    """The store in `folder`; None if there is none, or its manifest or the size of an array is not as it was written."""
    try:
        raw = (folder / _MANIFEST).read_bytes()
        content: dict[str, Any] = json.loads(raw)["content"]
        if raw != _manifest(content) or (content["format"], content["stamp"], content["files"]) != (FORMAT, stamp, len(paths)):
            return None
        shards = tuple(content["shards"])
        columns = {name: _mapped(folder / name, name, end) for name, (_, end) in _extents(shards)[-1].items()}
        if any(columns[name][0] for name in CUMULATIVE):
            return None
        return Store(folder, ExampleTable(**columns, paths=paths), counts_from(content["counts"]), shards)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_arrays(
    folder: Path, parts: Path, count: int, paths: tuple[str, ...], *, stamp: str
) -> tuple[list[dict[str, Any]], Counts, list[int]]:
    """Append the shards to the arrays; returns their sizes and checksums, the sum of their counts, and which are missing or damaged."""
    shards: list[dict[str, Any]] = []
    total, damaged = Counts(), []
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {name: stack.enter_context((folder / name).open("wb")) for name in COLUMNS}
        for name in CUMULATIVE:
            files[name].write(bytes(COLUMNS[name].itemsize))
        totals = dict.fromkeys(_KINDS, 0)
        for number in range(count):
            shard = read_shard(parts, number, paths, stamp=stamp)
            if shard is None:
                damaged.append(number)
                continue
            table, counts = shard
            columns = _parts(table, _extent(totals, _sizes(table)))
            shards.append({**_sizes(table), "checksums": _checksums_of(columns)})
            for name, column in columns.items():
                files[name].write(column.data)
            total.add(counts)
        for name, file in files.items():
            durable.flush_open(file, folder / name)
    return shards, total, damaged


def _extent(totals: dict[str, int], sizes: dict[str, Any]) -> Extent:
    """Where the elements of a shard of these sizes lie in every array, after shards with these totals; adds its sizes to the totals."""
    before = dict(totals)
    for kind in totals:
        totals[kind] += sizes[kind]
    return {name: (before[kind] + (name in CUMULATIVE), totals[kind] + (name in CUMULATIVE)) for name, kind in _PER.items()}


def _extents(shards: Iterable[dict[str, Any]]) -> list[Extent]:
    totals = dict.fromkeys(_KINDS, 0)
    return [_extent(totals, shard) for shard in shards]


def _sizes(table: ExampleTable) -> dict[str, Any]:
    return {"rows": table.num_rows, "examples": len(table), "tokens": len(table.tokens)}


def _parts(table: ExampleTable, extent: Extent) -> dict[str, NDArray[Any]]:
    """A shard's table as its part of the store's arrays: cumulative columns continue from the shards before it."""
    before = {"offsets": extent["tokens"][0], "firsts": extent["lines"][0]}
    return {name: column[1:] + before[name] if name in CUMULATIVE else column for name, column in table.columns().items()}


def _checksums_of(parts: dict[str, NDArray[Any]]) -> dict[str, int]:
    return {name: _crc(part) for name, part in parts.items()}


def _crc(array: NDArray[Any]) -> int:
    raw, checksum = array.view(np.uint8), 0
    for begin in range(0, len(raw), _BLOCK):
        checksum = zlib.crc32(raw[begin : begin + _BLOCK].data, checksum)
    return checksum


def _mapped(path: Path, name: str, count: int) -> NDArray[Any]:
    """The memory-mapped array of a file; ValueError if it does not hold exactly `count` elements."""
    if path.stat().st_size != count * COLUMNS[name].itemsize:
        raise ValueError(path)
    return np.asarray(np.memmap(path, COLUMNS[name], "r", shape=(count,))) if count else np.empty(0, COLUMNS[name])


def _manifest(content: dict[str, Any]) -> bytes:
    """The only bytes that a manifest with this content may have."""
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode() + b"\n"
