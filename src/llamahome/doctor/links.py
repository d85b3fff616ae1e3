"""A connection between two machines: what doctor's processes say over it, and how its latency and rate are measured.

Machine 0 asks, the other answers; every message is one line of JSON, and payloads are zeros. Standard library only.
"""

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

_HELLO = "llamahome-doctor"
_PINGS, _PAYLOAD, _PIECE = 20, 32 * 2**20, 2**20
_SECONDS = 20.0
"""In which an answer of the other machine must come."""
_LONGEST_LINE = 65_536


class Broken(OSError):
    """The other side said something else, or nothing."""


@dataclass(frozen=True)
class Link:
    """What machine 0 measured to one other machine."""

    rank: int
    host: str
    version: str
    """Of llamahome there."""
    latency_s: float
    """One way and back, the shortest of 20."""
    sent: float
    """Bytes a second from machine 0."""
    received: float
    """Bytes a second to machine 0."""
    open_ports: bool
    """Whether machine 0 reaches a port there that was chosen by the system, as torch's processes do."""


class Line:
    """Messages over one socket. Close it at the end."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._reader: BinaryIO = connection.makefile("rb")

    def close(self) -> None:
        """Close both directions."""
        self._reader.close()
        self.socket.close()

    def say(self, **message: Any) -> None:
        """Send one message. Raises OSError."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """Wait for one message. Raises OSError, which Broken is, too."""
        text = self._reader.readline(_LONGEST_LINE)
        try:
            message = json.loads(text)
        except ValueError:
            raise Broken(f"no message of doctor: {text[:40]!r}") from None
        if not isinstance(message, dict):
            raise Broken(f"no message of doctor: {text[:40]!r}")
        return message

    def pour(self) -> None:
        """Send the payload."""
        piece = bytes(_PIECE)
        for _ in range(_PAYLOAD // _PIECE):
            self.socket.sendall(piece)

    def drain(self) -> None:
        """Receive the payload."""
        left = _PAYLOAD
        while left:
            piece = self._reader.read(min(_PIECE, left))
            if not piece:
                raise Broken("the connection ended")
            left -= len(piece)


def introduce(line: Line, *, rank: int, nodes: str, version: str, port: int) -> None:
    """Tell machine 0 who is here; `port` is one that the system chose, on which `answer` listens."""
    line.say(program=_HELLO, rank=rank, nodes=nodes, version=version, host=socket.gethostname(), port=port)


def meet(line: Line) -> Mapping[str, Any]:
    """Who has connected. Raises Broken if it is no doctor."""
    hello = line.hear()
    if hello.get("program") != _HELLO or not all(isinstance(hello.get(name), int) for name in ("rank", "port")):
        raise Broken("another program")
    return hello


def measure(line: Line, hello: Mapping[str, Any]) -> Link:
    """Measure the link, as machine 0. Raises OSError."""
    latency = float("inf")
    for _ in range(_PINGS):
        started = time.perf_counter()
        line.say(do="ping")
        line.hear()
        latency = min(latency, time.perf_counter() - started)
    started = time.perf_counter()
    line.say(do="drain")
    line.pour()
    line.hear()
    sent = _PAYLOAD / (time.perf_counter() - started)
    started = time.perf_counter()
    line.say(do="pour")
    line.drain()
    received = _PAYLOAD / (time.perf_counter() - started)
    address = line.socket.getpeername()[0]
    try:
        socket.create_connection((address, int(hello["port"])), timeout=5).close()
        reached = True
    except OSError:
        reached = False
    return Link(int(hello["rank"]), str(hello["host"]), str(hello["version"]), latency, sent, received, reached)


def answer(line: Line) -> dict[str, Any]:
    """Do what machine 0 asks for until it ends; returns its last message. Raises OSError."""
    while True:
        message = line.hear()
        match message.get("do"):
            case "ping":
                line.say(did="ping")
            case "drain":
                line.drain()
                line.say(did="drain")
            case "pour":
                line.pour()
            case "wait":
                continue
            case _:
                return message
