"""Who may ask the dashboard, and what a browser may do with its pages.

Refused, in this order: a foreign Host or Origin (DNS rebinding, other sites), any method but GET and HEAD, a body, long headers or a long
address, and a request without the token if there is one. Where trainings may be started, a POST to some addresses is let through if it has
the token and a body of bounded size, and comes from a page of this server, which browsers say in Origin. The token is given once, in the
address or the form; the browser then holds a cookie that is derived from it, so that addresses and the history do not keep it. Pages may
load nothing but the server's own files, and no page of another site may frame or read them.
"""

import hashlib
import hmac
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamahome.dashboard.pages import Pages
from llamahome.web.access import Access

_LONGEST = 2048
"""Bytes of an address with its query."""
_MOST_HEADERS = 16384
"""Bytes. h11 has this limit too, but only for headers that do not arrive at once."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Gate:
    """Refuses what may not be asked before anything of it is read, and adds the headers that confine every page."""

    def __init__(self, app: ASGIApp, access: Access, pages: Pages, most_bytes: Callable[[str], int | None] | None = None) -> None:
        """`most_bytes` says how large the body of a POST to an address may be, None if there is no such address; without it none is."""
        self._app, self._access, self._pages, self._most_bytes = app, access, pages, most_bytes
        # with no-referrer a browser would write "Origin: null" into the forms that it sends
        self._headers = (*_HEADERS, (b"referrer-policy", b"no-referrer" if most_bytes is None else b"same-origin"))
        self._cookie = f"llamahome-{access.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        await (self._refusal(scope) or self._app)(scope, receive, sending)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        denied = self._access.denied(scope["headers"], needs_key=False)
        if denied is not None:
            return PlainTextResponse(f"{denied.message}\n", denied.status, {"connection": "close"})
        posted = scope["method"] == "POST" and self._most_bytes is not None
        if scope["method"] not in ("GET", "HEAD") and not posted:
            return PlainTextResponse("this server only shows; it answers GET\n", 405, {"allow": "GET, HEAD", "connection": "close"})
        if not posted and (headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers):
            return PlainTextResponse("a request to this server has no body\n", 400, {"connection": "close"})
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MOST_HEADERS:
            return PlainTextResponse("the headers are too long\n", 431, {"connection": "close"})
        if len(scope["raw_path"]) + len(scope["query_string"]) > _LONGEST:
            return PlainTextResponse("the address is too long\n", 414, {"connection": "close"})
        if posted:
            return self._refused_post(scope, headers)
        return self._without_token(scope, headers) if self._access.key is not None else None

    def _refused_post(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        """Why a POST is refused before its body is read; every refusal closes the connection, so that the body is not sent in vain."""
        most = self._most_bytes(scope["path"]) if self._most_bytes is not None else None
        length = headers.get(b"content-length", b"")
        has_key = self._access.key is not None and self._access.denied(scope["headers"]) is None
        if most is None:
            status, why = 405, "nothing can be sent to this address"
        elif not has_key and not self._session_of(headers):
            status, why = 401, "this needs the token"
        elif not has_key and b"origin" not in headers:
            status, why = 403, "the request does not say that it comes from a page of this server"
        elif b"transfer-encoding" in headers or not length.isdigit():
            status, why = 411, "the length of the body must be announced"
        elif int(length[:20]) > most:
            status, why = 413, f"the body is larger than {most:,} bytes"
        else:
            return None
        return PlainTextResponse(f"{why}\n", status, {"connection": "close"})

    def _without_token(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        """None if the request shows the token; a redirect that hands out the cookie if the address holds it; otherwise a refusal."""
        if self._session_of(headers) or self._access.denied(scope["headers"]) is None:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        given = [value for name, value in query if name == "token"]
        if len(given) == 1 and hmac.compare_digest(given[0].encode(), (self._access.key or "").encode()):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            path = "/" + scope["raw_path"].decode("latin-1").lstrip("/")  # //host would lead to another host
            answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303, {"cache-control": "no-store"})
            answer.set_cookie(self._cookie, self._session, httponly=True, samesite="strict", path="/")
            return answer
        if scope["path"].startswith("/static/"):  # they are in the package for everybody to read
            return None
        if scope["path"].startswith("/api/"):
            return PlainTextResponse("this needs the token\n", 401)
        return self._pages.ask_for_token(wrong=bool(given))

    @property
    def _session(self) -> str:
        """What the cookie holds."""
        return hmac.new((self._access.key or "").encode(), b"llamahome dashboard", hashlib.sha256).hexdigest()

    def _session_of(self, headers: dict[bytes, bytes]) -> bool:
        if self._access.key is None:
            return False
        try:
            cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return False
        held = cookies.get(self._cookie)
        return held is not None and hmac.compare_digest(held.value.encode(), self._session.encode())
