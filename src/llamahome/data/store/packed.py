"""Tables and their counts as bytes, the same in a file and through a pipe: a line of JSON that says what follows, then the arrays.

Every array and the line itself carry a CRC-32 (it finds every flip of up to 32 neighbouring bits); what does not match is refused.
"""

import json
import zlib
from typing import Any

import numpy as np

from llamahome.data.store.counts import Counts, counts_from
from llamahome.data.store.table import COLUMNS, ExampleTable

_MARK = "llamahome rows 1"


class Damaged(Exception):
    """The bytes are not what was packed."""


def pack(table: ExampleTable, counts: Counts, *, stamp: str = "") -> bytes:
    """The table but its paths, and the counts; `stamp` is a word that `unpack` must find again."""
    arrays = {name: column.view(np.uint8).data for name, column in table.columns().items()}
    sizes = {name: [len(array), zlib.crc32(array)] for name, array in arrays.items()}
    head = json.dumps({"arrays": sizes, "counts": counts.as_json(), "stamp": stamp}).encode()
    line = f"{_MARK} {zlib.crc32(head):08x} ".encode() + head + b"\n"
    return b"".join((line, *arrays.values()))


def unpack(content: bytes, paths: tuple[str, ...], *, stamp: str = "") -> tuple[ExampleTable, Counts]:
    """What was packed, the arrays as views into `content`; raises Damaged."""
    mark, _, rest = content[: content.find(b"\n") + 1].partition(b" {")
    head = b"{" + rest[:-1]
    if mark != f"{_MARK} {zlib.crc32(head):08x}".encode():
        raise Damaged("the first line")
    told: dict[str, Any] = json.loads(head)
    if told["stamp"] != stamp:
        raise Damaged("it is of other data")
    view, columns = memoryview(content)[content.find(b"\n") + 1 :], {}
    for name, dtype in COLUMNS.items():
        size, checksum = told["arrays"][name]
        part, view = view[:size], view[size:]
        if len(part) != size or zlib.crc32(part) != checksum:
            raise Damaged(name)
        columns[name] = np.frombuffer(part, dtype)
    return ExampleTable(**columns, paths=paths), counts_from(told["counts"])
