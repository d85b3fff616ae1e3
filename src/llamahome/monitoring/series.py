"""Follows a growing .jsonl file from a cursor, and thins curves so that every spike survives. No torch.

A reader never holds the file open: the run may be killed, its records may be moved to superseded.jsonl at a resume, the folder may vanish.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_BYTES = 8 << 20
"""Read at once, so that a long file is followed in pieces of bounded memory."""


_PARSED_AT_ONCE = 256
"""Lines."""


@dataclass(frozen=True)
class Cursor:
    """A position in a file: the file's identity (inode) and the bytes read of it. `Cursor()` is the beginning."""

    inode: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Records:
    """What was appended since a cursor."""

    records: list[dict[str, Any]]
    cursor: Cursor
    """Where to go on."""
    restarted: bool
    """The file is another one, or shorter than the cursor: `records` begin at its start, and what was read before no longer counts."""
    damaged: int
    """Complete lines that are not JSON objects."""
    more: bool
    """There is more to read already; ask again with `cursor`."""


def read_from(path: Path, cursor: Cursor = Cursor()) -> Records:
    """Read the whole records of `path` after `cursor`, at most 8 MiB at once; a torn last line is left for the next time.

    A file that is missing or cannot be read has no records.
    """
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            restarted = cursor.offset > 0 and (facts.st_ino != cursor.inode or facts.st_size < cursor.offset)
            offset = cursor.offset if facts.st_ino == cursor.inode and not restarted else 0
            file.seek(offset)
            content = file.read(_MOST_BYTES)
    except OSError:
        return Records([], Cursor(), cursor.offset > 0, 0, more=False)
    whole = content[: content.rfind(b"\n") + 1]
    if not whole and len(content) == _MOST_BYTES:
        whole = content  # no line is that long: it is damaged, and passing over it is better than waiting for ever
    found, damaged = parse(whole)
    return Records(found, Cursor(facts.st_ino, offset + len(whole)), restarted, damaged, more=len(content) == _MOST_BYTES)


def parse(lines: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records of `lines`, and the number of lines that are not JSON objects. Lines without any text do not count."""
    whole = [line for line in lines.split(b"\n") if line.strip()]
    records: list[dict[str, Any]] = []
    damaged = 0
    for begin in range(0, len(whole), _PARSED_AT_ONCE):
        some = whole[begin : begin + _PARSED_AT_ONCE]
        found = _parse_at_once(some)
        if found is None:
            found = [record for record in map(_parse_one, some) if record is not None]
            damaged += len(some) - len(found)
        records += found
    return records, damaged


def _parse_at_once(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """The records of lines that are whole objects, parsed as one array in two thirds of the time (measured); None if any is not."""
    if not all(line.startswith(b"{") and line.endswith(b"}") for line in lines):
        return None
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        return None
    return found if len(found) == len(lines) else None


def _parse_one(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def thin(x: Sequence[float], y: Sequence[float | None], points: int) -> tuple[list[float], list[float | None]]:
    """At most about `points` of a curve: of each bucket its lowest and its highest value, in order, and one mark where values are missing.

    The first and the last point always stay. A missing value is None or not finite, and is returned as None.
    """
    values = list(y) if _all_finite(y) else [value if value is not None and math.isfinite(value) else None for value in y]
    kept = extremes(values, points)
    return [x[index] for index in kept], [values[index] for index in kept]


def extremes(values: Sequence[Any], points: int) -> list[int]:
    """The places of the values that `thin` keeps: anything that can be compared, and None where one is missing."""
    if len(values) <= max(points, 4):
        return list(range(len(values)))
    buckets = max(1, (points - 2) // 3)
    inner = len(values) - 2
    chosen = {0, len(values) - 1}
    for number in range(buckets):
        begin, end = 1 + number * inner // buckets, 1 + (number + 1) * inner // buckets
        bucket = values[begin:end]
        known = [value for value in bucket if value is not None] if None in bucket else bucket
        if known:
            chosen |= {begin + bucket.index(min(known)), begin + bucket.index(max(known))}
        if len(known) < len(bucket):
            chosen.add(begin + bucket.index(None))
    return sorted(chosen)


def _all_finite(values: Sequence[float | None]) -> bool:
    """Whether none of them is None, nan or infinite; False also where their sum is too large. One addition for each value."""
    try:
        return math.isfinite(sum(values))  # type: ignore[arg-type]
    except TypeError:
        return False
