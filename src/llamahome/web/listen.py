"""Opens the socket of a server, and runs the server until SIGINT or SIGTERM.

The socket is bound before the server starts, so that a port in use is an error with its true reason. Limits of a connection: 16 KiB of
headers, which must be there within ten seconds; at most 256 connections.
"""

import asyncio
import errno
import secrets
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llamahome.errors import ConfigError, MachineError, Problem
from llamahome.web.access import bracketed, is_loopback

_SECONDS_FOR_HEADERS = 10
_SECONDS_TO_END = 5
_MOST_CONNECTIONS = 256


def open_socket(host: str, port: int, *, key: str | None, option: Literal["--api-key", "--token"] = "--api-key") -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises ConfigError beyond loopback without a key, MachineError if it cannot be had.

    `option` is how the key of this server is typed.
    """
    if not is_loopback(host) and key is None:
        message = f"{host} can be reached from other machines, and without a key anybody there could use this server"
        hint = f"--token {secrets.token_urlsafe(16)}" if option == "--token" else "--api-key KEY"
        raise ConfigError(Problem(code="usage.host-without-key", message=message, where="--host", hint=hint))
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise MachineError(Problem(code="machine.cannot-listen", message=f"{host}: {error.strerror or error}", where="--host")) from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(128)
    except OSError as error:
        opened.close()
        raise MachineError(_cannot_listen(host, port, error)) from error
    return opened


def _cannot_listen(host: str, port: int, error: OSError) -> Problem:
    if error.errno not in (errno.EADDRINUSE, errno.EACCES):
        return Problem(code="machine.cannot-listen", message=f"{host}: {error.strerror}", where="--host")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hint = f"--port {free.getsockname()[1]}"
    why = "another program listens there" if error.errno == errno.EADDRINUSE else "only root may listen there"
    return Problem(code="machine.port-taken", message=f"port {port} of {host} is not free: {why}", where="--port", hint=hint)


def url_of(opened: socket.socket, host: str) -> str:
    """The address that clients use."""
    return f"http://{bracketed(host)}:{opened.getsockname()[1]}"


class _Connection(H11Protocol):
    """Closes connections whose headers do not come, and answers what is not HTTP in JSON."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.close()
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waiting is None and self._is_idle():  # the beginning of another request on the same connection
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(_SECONDS_FOR_HEADERS, self._close_if_idle)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _close_if_idle(self) -> None:
        self._waiting = None
        if self._is_idle():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        body = b'{"error": {"message": "this is not an HTTP request", "type": "invalid_request_error", "param": null, "code": null}}'
        if self._is_idle() or not self.cycle.response_started:
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """Says when it answers, and ends on a signal without raising it again."""

    def __init__(self, config: uvicorn.Config, *, ready: Callable[[], None], stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready, self._stop = ready, stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._stop()


def serve(app: Any, opened: socket.socket, *, ready: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run an ASGI app until SIGINT or SIGTERM. `stop` is called at the signal, to end work that would go on; a second one ends at once."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    _Server(config, ready=ready, stop=stop).run(sockets=[opened])
