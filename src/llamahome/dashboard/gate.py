"""Who may ask the dashboard, and what a browser may do with its pages.

Refused, in this order: a foreign Host or Origin (DNS rebinding, other sites), any method but GET and HEAD, a body, long headers or a long
address, and a request without the token if there is one. The token is given once, in the address or the form; the browser then holds a
cookie that is derived from it, so that addresses and the history do not keep it. Pages may load nothing but the server's own files, and
no page of another site may frame or read them.
"""

import hashlib
import hmac
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
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Gate:
    """Refuses what may not be asked before anything of it is read, and adds the headers that confine every page."""

    def __init__(self, app: ASGIApp, access: Access, pages: Pages) -> None:
        self._app, self._access, self._pages = app, access, pages
        self._cookie = f"llamahome-{access.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await (self._refusal(scope) or self._app)(scope, receive, sending)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        denied = self._access.denied(scope["headers"], needs_key=False)
        if denied is not None:
            return PlainTextResponse(f"{denied.message}\n", denied.status, {"connection": "close"})
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("this server only shows; it answers GET\n", 405, {"allow": "GET, HEAD", "connection": "close"})
        if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
            return PlainTextResponse("a request to this server has no body\n", 400, {"connection": "close"})
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MOST_HEADERS:
            return PlainTextResponse("the headers are too long\n", 431, {"connection": "close"})
        if len(scope["raw_path"]) + len(scope["query_string"]) > _LONGEST:
            return PlainTextResponse("the address is too long\n", 414, {"connection": "close"})
        return self._without_token(scope, headers) if self._access.key is not None else None

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
        try:
            cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return False
        held = cookies.get(self._cookie)
        return held is not None and hmac.compare_digest(held.value.encode(), self._session.encode())
