"""Answers in the JSON of the OpenAI API: whole, or as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from llamahome.conversation import Answer
from llamahome.serving.asked import Refused
from llamahome.serving.worker import Job

Shape = Literal["chat", "text"]
"""/v1/chat/completions or /v1/completions."""
_ENDS = {"stop": "stop", "length": "length", "cancelled": "stop"}


def whole(answer: Answer, shape: Shape, model: str) -> dict[str, Any]:
    """One answer."""
    reason = _ENDS[answer.finish]
    if shape == "text":
        choice: dict[str, Any] = {"index": 0, "text": answer.text, "logprobs": None, "finish_reason": reason}
    else:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {**_head(shape, model, "chat.completion"), "choices": [choice], "usage": _usage(answer)}


async def events(job: Job, shape: Shape, model: str, *, include_usage: bool, note: Callable[[Answer], None]) -> AsyncIterator[bytes]:
    """The events of a stream, [DONE] at its end; an error after its beginning is an event, too."""
    head = _head(shape, model, "chat.completion.chunk") | ({"usage": None} if include_usage else {})

    def event(delta: dict[str, Any], text: str, reason: str | None = None) -> bytes:
        part = {"text": text} if shape == "text" else {"delta": delta}
        return _event({**head, "choices": [{"index": 0, **part, "logprobs": None, "finish_reason": reason}]})

    if shape == "chat":
        yield event({"role": "assistant", "content": ""}, "")
    while True:
        piece = await job.pieces.get()
        if isinstance(piece, str):
            yield event({"content": piece}, piece)
            continue
        if isinstance(piece, BaseException) or piece.finish == "cancelled":
            stopping = not isinstance(piece, BaseException)
            message = "the server is stopping" if stopping else "the server failed; its terminal shows why"
            yield _event(Refused(message, status=503 if stopping else 500, api_code="stopping" if stopping else "failed").body())
            if isinstance(piece, BaseException):
                raise piece
            return
        note(piece)
        yield event({}, "", _ENDS[piece.finish])
        if include_usage:
            yield _event({**head, "choices": [], "usage": _usage(piece)})
        yield b"data: [DONE]\n\n"
        return


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _head(shape: Shape, model: str, kind: str) -> dict[str, Any]:
    prefix, kind = ("cmpl", "text_completion") if shape == "text" else ("chatcmpl", kind)
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }
