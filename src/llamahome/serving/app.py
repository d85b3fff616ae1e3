"""The HTTP side of `llamahome serve`: the endpoints of the OpenAI API that people use to try a model, and who may ask them.

Every error has the JSON shape of that API. Bodies are at most 4 MiB and must arrive within 30 seconds. One line a request is logged:
method, path, status, time and tokens, never a text.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamahome.conversation import Answer, ChatModel
from llamahome.errors import LlamaHomeError
from llamahome.model.sampling import Sampling
from llamahome.serving.asked import Asked, Refused, parse, read_chat, read_completion
from llamahome.serving.replies import Shape, events, whole
from llamahome.serving.worker import Busy, Job, Worker
from llamahome.web.access import Access

_MOST_BYTES = 4 * 2**20
_MOST_DRAINED = 64 * 2**20
"""Bytes of a refused body that are read and thrown away, because many clients only read the answer after they have sent everything."""
_SECONDS_FOR_BODY = 30
_RETRY_AFTER = "2"
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")


@dataclass(frozen=True)
class Served:
    """What is served, under which names, with which defaults."""

    model: ChatModel
    names: tuple[str, ...]
    """The id of the model, then other names by which it may be asked."""
    default: Sampling
    waiting: int
    system: str | None = None
    """Begins every conversation that has no system message of its own."""


class _EventStream(Response):
    """Server-sent events; whatever ends them, the job ends, too."""

    def __init__(self, pieces: AsyncIterator[bytes], job: Job) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._pieces, self._job = pieces, job
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._job.cancelled.set()
            sending.cancel()
            gone.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    """Return when the client has left; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Endpoints:
    """One method for each endpoint."""

    def __init__(self, served: Served, worker: Worker) -> None:
        self._served, self._worker, self._born = served, worker, int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = read_chat(parse(await _body(request)), self._served.names, self._served.default)
        if self._served.model.tokenizer.chat_template is None:
            message = "this model has no chat template: ask /v1/completions, or serve it with --set model.chat_template=FILE.jinja"
            raise Refused(message, api_code="no_chat_template")
        return await self._answer(request, asked, "chat", lambda: self._served.model.encode(asked.turns_after(self._served.system)))

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = read_completion(parse(await _body(request)), self._served.names, self._served.default)
        return await self._answer(request, asked, "text", lambda: self._served.model.encode_text(asked.text))

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        if request.path_params["name"] not in self._served.names:
            raise Refused(f"there is no such model; this server has {self._served.names[0]}", api_code="model_not_found", status=404)
        return JSONResponse(self._described())

    async def health(self, _: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok"})

    async def index(self, _: Request) -> Response:
        """GET /."""
        return JSONResponse({"model": self._served.names[0], "endpoints": _ENDPOINTS})

    def _described(self) -> dict[str, Any]:
        described = {"id": self._served.names[0], "object": "model", "created": self._born, "owned_by": "llamahome"}
        return described | ({"max_model_len": self._context} if self._context is not None else {})

    @property
    def _context(self) -> int | None:
        limits = self._served.model.limits
        return limits.positions if limits.positions is not None else limits.trained_length

    async def _answer(self, request: Request, asked: Asked, shape: Shape, encode: Callable[[], list[int]]) -> Response:
        try:
            prompt = await self._worker.encode(encode)
        except LlamaHomeError as error:
            problem = error.problems[0]
            too_long = problem.code == "model.too-long"
            raise Refused(problem.message, param="messages", api_code="context_length_exceeded" if too_long else problem.code) from error
        sampling = self._within_context(asked.sampling, len(prompt))
        job = self._worker.start(prompt, sampling, asked.stops)
        if asked.stream:
            usage = asked.include_usage
            return _EventStream(events(job, shape, self._served.names[0], include_usage=usage, note=_noter(request)), job)
        answer = await _result(request, job)
        _noter(request)(answer)
        return JSONResponse(whole(answer, shape, self._served.names[0]))

    def _within_context(self, sampling: Sampling, tokens: int) -> Sampling:
        """The sampling with at most as many new tokens as there is room for. Raises Refused if there is none."""
        if self._context is None:
            return sampling
        if tokens >= self._context:
            message = f"the prompt has {tokens:,} tokens, and this model's context is {self._context:,}: none is left for an answer"
            raise Refused(message, param="messages", api_code="context_length_exceeded")
        return sampling.at_most(self._context - tokens)


def _noter(request: Request) -> Callable[[Answer], None]:
    def note(answer: Answer) -> None:
        request.scope["llamahome.note"] = f"{answer.prompt_tokens}+{answer.completion_tokens} tokens {answer.finish}"

    return note


async def _result(request: Request, job: Job) -> Answer:
    """The whole answer; ClientDisconnect if the client leaves before it is there."""
    gone = asyncio.ensure_future(_until_gone(request.receive))
    try:
        while True:
            piece = asyncio.ensure_future(job.pieces.get())
            await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                piece.cancel()
                raise ClientDisconnect
            found = piece.result()
            if isinstance(found, BaseException):
                raise found
            if isinstance(found, Answer):
                if found.finish == "cancelled":
                    raise Refused("the server is stopping", status=503, api_code="stopping")
                return found
    finally:
        job.cancelled.set()
        gone.cancel()


async def _body(request: Request) -> bytes:
    """The body of a request; raises Refused if it is too long, too slow or of another type."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused("send JSON with the header Content-Type: application/json", status=415)
    told = request.headers.get("content-length", "0")
    too_large = Refused(f"the body is larger than {_MOST_BYTES:,} bytes", status=413)
    if told.isdigit() and int(told[:20]) > _MOST_DRAINED:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(_SECONDS_FOR_BODY):
            async for part in request.stream():
                size += len(part)
                if size <= _MOST_BYTES:
                    body += part
                elif size > _MOST_DRAINED:
                    break
    except TimeoutError as error:
        raise (too_large if size > _MOST_BYTES else Refused("the body did not arrive in time", status=408)) from error
    if size > _MOST_BYTES:
        raise too_large
    return bytes(body)


def make_app(served: Served, access: Access, *, log: Callable[[str], None]) -> tuple[ASGIApp, Worker]:
    """The app, and the worker that has to be stopped with the server."""
    worker = Worker(served.model, waiting=served.waiting)
    endpoints = _Endpoints(served, worker)
    routes = [
        Route("/", endpoints.index),
        Route("/health", endpoints.health),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completion, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {Refused: _refused, Busy: _busy, HTTPException: _http, ClientDisconnect: _left, Exception: _failed}
    return _Gate(Starlette(routes=routes, exception_handlers=handlers), access, log), worker


class _Gate:
    """Refuses foreign requests before anything of them is read, and logs one line for each request."""

    def __init__(self, app: ASGIApp, access: Access, log: Callable[[str], None]) -> None:
        self._app, self._access, self._log = app, access, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun, status = time.monotonic(), "left"

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        denied = self._access.denied(scope["headers"], needs_key=scope["path"] != "/health")
        try:
            if denied is not None:
                await _reply(Refused(denied.message, api_code=denied.code, status=denied.status))(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        finally:
            path = ascii(scope["path"])[1:-1][:80]
            note = scope.get("llamahome.note", "")
            self._log(
                f"{time.strftime('%H:%M:%S')} {scope['method'][:16]} {path} {status} {time.monotonic() - begun:.2f} s {note}".rstrip()
            )


def _reply(refused: Refused, headers: dict[str, str] | None = None) -> Response:
    extra = {"www-authenticate": "Bearer"} if refused.status == 401 else {}
    closing = {"connection": "close"} if refused.status in (403, 408, 413, 415) else {}  # the rest of the body is not read
    return JSONResponse(refused.body(), status_code=refused.status, headers={**extra, **closing, **(headers or {})})


async def _refused(_: Request, error: Refused) -> Response:
    return _reply(error)


async def _busy(_: Request, __: Busy) -> Response:
    busy = Refused("this server answers one request at a time, and its queue is full", status=503, api_code="busy")
    return _reply(busy, {"retry-after": _RETRY_AFTER})


async def _http(request: Request, error: HTTPException) -> Response:
    messages = {404: f"there is nothing at this path; there is {', '.join(_ENDPOINTS)}", 405: "this path takes another method"}
    return _reply(Refused(messages.get(error.status_code, error.detail), status=error.status_code), dict(error.headers or {}))


async def _left(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _failed(_: Request, __: Exception) -> Response:
    return _reply(Refused("the server failed; its terminal shows why", status=500, api_code="failed"))
