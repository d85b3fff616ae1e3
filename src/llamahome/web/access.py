"""Who may ask a server on this machine: the Host and Origin of a request, and its key.

A web page can let the browser of a visitor send requests to 127.0.0.1, or give its own name the address 127.0.0.1 (DNS rebinding). Such
requests name a foreign Host or Origin, so both are compared with the names of this server, port included. No library is needed here.
"""

import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI gives them: names in small letters."""


@dataclass(frozen=True)
class Denied:
    """Why a request is not answered."""

    status: int
    code: str
    message: str


@dataclass(frozen=True)
class Access:
    """Who may ask a server that listens on `host` and `port`. A server beyond loopback has a key, and any Host is good enough there."""

    host: str
    port: int
    key: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """What a Host header may be."""
        names = {"127.0.0.1", "localhost", "[::1]", bracketed(self.host).lower()}
        return frozenset({f"{name}:{self.port}" for name in names} | (names if self.port == 80 else set()))

    def denied(self, headers: Headers, *, needs_key: bool = True) -> Denied | None:
        """Why a request with these headers is refused; None if it may be answered."""
        found: dict[bytes, list[str]] = {}
        for name, value in headers:
            found.setdefault(name, []).append(value.decode("latin-1").strip())
        hosts, origins = found.get(b"host", []), found.get(b"origin", [])
        if len(hosts) != 1 or (is_loopback(self.host) and hosts[0].lower() not in self.names):
            return Denied(403, "foreign_host", "the Host header does not name this server")
        own = {f"http://{name}" for name in (*self.names, hosts[0].lower())}
        if len(origins) > 1 or (origins and origins[0].lower() not in own):
            return Denied(403, "foreign_origin", "the request comes from a page of another origin")
        if found.get(b"sec-fetch-site", ["none"])[0] not in ("none", "same-origin"):
            return Denied(403, "foreign_origin", "the request comes from a page of another site")
        if self.key is not None and needs_key and not self._has_key(found.get(b"authorization", [])):
            return Denied(401, "invalid_api_key", "the Authorization header does not hold this server's key: Bearer KEY")
        return None

    def _has_key(self, values: list[str]) -> bool:
        assert self.key is not None
        scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bracketed(host: str) -> str:
    """The host as a URL holds it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
