"""Messages between a process and the workers that tokenize for it: a length and so many bytes, over a pipe."""

import struct
from typing import IO

READY, ROWS, PROBLEMS, FAILED = b"+", b"R", b"P", b"F"
"""First byte of an answer: ready to work; rows; problems with the source; a defect, after which the worker ends."""
_LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], *parts: bytes) -> None:
    """Write one message; raises OSError when the other side is gone."""
    stream.write(_LENGTH.pack(sum(map(len, parts))))
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """The next message, None when the other side is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    content = stream.read(length)
    return content if len(content) == length else None
