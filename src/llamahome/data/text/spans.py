"""The target span of an assistant turn in a rendered chat: from the end of its prompt to the end of its end-of-turn token.

The span is verified by two more renderings: of the chat up to the turn with the generation prompt, and of the chat including the turn. The
rendering of the complete chat must begin with the first, agree with the second up to the end token, and contain the turn's text between the
two. What the template itself writes there (white space, an empty thought) belongs to the answer, because the model has to write it too. If
a template marks the answers with `{% generation %}`, its marks are used and checked against the turns. A span that cannot be verified is an
error.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.data.rows.row_error import RowError
from llamahome.data.rows.toolcalls import shown_calls
from llamahome.data.text.tokens import ChatTokenizer

Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Span:
    """Characters of the rendered text that are targets."""

    begin: int
    end: int
    last_id: int | None
    """The end-of-turn token at the end of the span; None if the template writes none."""
    stop: int
    """The character after that token: `end`, unless the template's own marks include white space after the token."""


def find_span(turns: Any, number: int, chat_text: str, tokenizer: ChatTokenizer, *, tools: Any = ()) -> Span:
    """The span of assistant turn `number` in `chat_text`, the rendering of all turns; raises RowError if it cannot be verified."""
    try:
        before = tokenizer.render(turns[:number], tools=tools, add_generation_prompt=True)
        through = chat_text if number == len(turns) - 1 else tokenizer.render(turns[: number + 1], tools=tools)
    except RowError as error:
        raise unverified(number, f"it refuses the chat up to this turn ({error.message.partition(': ')[2]})") from error
    if not chat_text.startswith(before):
        raise unverified(number, _prompt_reason(chat_text, through))
    if not through.startswith(before):
        raise unverified(number, _DIFFERS)
    tail = through[len(before) :]
    at, size, last_id = _answer(tail, turns[number], number, tokenizer)
    _check_thoughts(turns[number], number, tail[:at])
    if tail[:at].strip() and before == tokenizer.render(turns[:number], tools=tools):
        raise unverified(number, f"it has no generation prompt, but in a finished chat it writes {tail[:at]!r} before an answer")
    end = len(before) + size
    if not chat_text.startswith(tail[:size], len(before)):
        raise unverified(number, _DIFFERS, hint=f"--set data.train_on=last learns the last answer of each chat alone, or {_OTHER}")
    return Span(len(before), end, last_id, end)


def marked_spans(turns: Turns, numbers: Sequence[int], text: str, marks: Sequence[tuple[int, int]], tokenizer: ChatTokenizer) -> list[Span]:
    """The spans that the template marks for these assistant turns; raises RowError if they are not the turns with their ends."""
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(marks) != len(answers):
        reason = f"its generation marks enclose {len(marks)} texts for {len(answers)} assistant turns"
        raise unverified(numbers[0], reason)
    spans = []
    for number in numbers:
        begin, end = marks[answers.index(number)]
        at, size, last_id = _answer(text[begin:end], turns[number], number, tokenizer)
        _check_thoughts(turns[number], number, text[begin : begin + at])
        after = tokenizer.added_token_at(text[end:].lstrip())
        if last_id is None and after is not None:
            raise unverified(number, f"its generation marks leave out {after}, so the model would never learn to end")
        spans.append(Span(begin, end if last_id is not None else begin + size, last_id, begin + size))
    return spans


def check_shown(turns: Turns, chat_text: str) -> None:
    """Raise RowError if the rendering lacks a tool call or a turn of the user, the system or a tool."""
    for number, turn in enumerate(turns):
        missing = shown_calls(turn.get("tool_calls", ()), chat_text)
        if missing is not None:
            raise left_out(number, turn["role"], missing)
        longest = max((line.strip() for line in turn.get("content", "").splitlines()), key=len, default="")
        if turn["role"] != "assistant" and longest not in chat_text and _as_json(longest) not in chat_text:
            raise left_out(number, turn["role"])


def left_out(number: int, role: str, what: str = "the text") -> RowError:
    """The error for a turn that the template does not render."""
    message = f"the model's chat template leaves out {what} of turn {number} ({role})"
    return RowError("data.turn-left-out", message, hint="remove the turn from the row" if what == "the text" else OTHER_TEMPLATE)


def unverified(number: int, reason: str, *, hint: str | None = None) -> RowError:
    """The error for an answer whose span cannot be verified."""
    message = f"which tokens of turn {number} are learned cannot be determined because of the model's chat template: {reason}"
    return RowError("data.mask-unproved", message, hint=hint or _OTHER)


_DIFFERS = "it writes the turn differently once later turns follow"
OTHER_TEMPLATE = "--set model.chat_template=FILE.jinja takes a template that writes it, or remove the row"
_OTHER = "--set data.train_on=all learns the questions too; or another model.chat_template"


def _prompt_reason(chat_text: str, through: str) -> str:
    return "its generation prompt is not how it begins the turn in a finished chat" if chat_text.startswith(through) else _DIFFERS


def _answer(tail: str, turn: Mapping[str, Any], number: int, tokenizer: ChatTokenizer) -> tuple[int, int, int | None]:
    """For a text that begins with the answer: where the turn's text begins, the length up to and with the end token, and that token."""
    content = turn.get("content", "").strip()
    if turn.get("tool_calls"):
        return _calls(tail, turn, number, tokenizer)
    at = -1
    while (at := tail.find(content, at + 1)) >= 0:
        stop = at + len(content)
        rest = tail[stop:].lstrip()
        end = tokenizer.added_token_at(rest)
        if end is not None:
            return at, len(tail) - len(rest) + len(end), tokenizer.added_tokens[end]
        if not rest:
            return at, stop, None
    for end, stop in _trailing_ends(tail, tokenizer):
        if _without_spaces(tail[: stop - len(end)]) == _without_spaces(content):
            return 0, stop, tokenizer.added_tokens[end]
    at = tail.find(content)
    if at < 0:
        raise unverified(number, f"it changes the assistant's text, which becomes {tail.lstrip()[:60]!r}")
    rest = tail[at + len(content) :].lstrip()
    raise unverified(number, f"after the assistant's text it writes {rest[:30]!r}, which is not a token that ends a turn")


def _check_thoughts(turn: Mapping[str, Any], number: int, before: str) -> None:
    if _without_spaces(turn.get("reasoning_content", "")) not in _without_spaces(before):
        raise unverified(number, "it leaves out the thoughts before the answer")


def _calls(tail: str, turn: Mapping[str, Any], number: int, tokenizer: ChatTokenizer) -> tuple[int, int, int | None]:
    """The same for a turn with tool calls, each of which must be shown with its name and all its arguments."""
    ends = list(_trailing_ends(tail, tokenizer))
    usual = [end for end in ends if tokenizer.added_tokens[end[0]] in tokenizer.end_ids]
    control = [end for end in ends if end[0] in tokenizer.control_tokens]
    last = (usual or control)[-1:]
    stop = last[0][1] if last else len(tail.rstrip())
    missing = shown_calls(turn["tool_calls"], tail[:stop])
    if missing is not None:
        raise left_out(number, turn["role"], missing)
    if _without_spaces(turn.get("content", "")) not in _without_spaces(tail[:stop]):
        raise unverified(number, "beside tool calls it leaves out the turn's text")
    if not last and tokenizer.turn_end is not None:
        raise unverified(number, "it writes no token that ends the turn after a tool call")
    return 0, stop, tokenizer.added_tokens[last[0][0]] if last else None


def _trailing_ends(tail: str, tokenizer: ChatTokenizer) -> Iterator[tuple[str, int]]:
    """The added tokens at the end of the text, the last first, each with the position after it; white space between them is skipped."""
    while (end := tokenizer.added_token_before(tail := tail.rstrip())) is not None:
        yield end, len(tail)
        tail = tail[: -len(end)]


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
