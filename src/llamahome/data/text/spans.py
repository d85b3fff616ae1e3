"""Which stretch of a rendered chat is learned of an assistant turn: from the end of its prompt to the end of its end-of-turn token.

Shown by rendering the chat up to the turn with the generation prompt, and through the turn: the whole rendering must begin with the
first, agree with the second up to the end token, and hold the turn's text between the two. What the template itself writes there (white
space, an empty thought) belongs to the answer, for the model has to write it too. A template with `{% generation %}` says itself what
the assistant writes; then its marks decide and are checked against the turn. What cannot be shown is refused, never guessed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.data.rows.fault import Finding
from llamahome.data.rows.toolcalls import shown_calls
from llamahome.data.text.tokens import ChatTokenizer

Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Span:
    """Characters of the rendered text that are learned."""

    begin: int
    end: int
    last_id: int | None
    """The end-of-turn token that they hold at their end; None when the template writes none."""
    stop: int
    """Character after that token: `end`, unless the template's own marks enclose white space behind it."""


def find_span(turns: Any, number: int, whole: str, tokenizer: ChatTokenizer, *, tools: Any = ()) -> Span:
    """Where assistant turn `number` and its end lie in `whole`, the rendering of all turns; raises Finding when it cannot be shown."""
    try:
        before = tokenizer.render(turns[:number], tools=tools, add_generation_prompt=True)
        through = whole if number == len(turns) - 1 else tokenizer.render(turns[: number + 1], tools=tools)
    except Finding as finding:
        raise unproved(number, f"it refuses the chat up to this turn ({finding.message.partition(': ')[2]})") from finding
    if not whole.startswith(before):
        raise unproved(number, _prompt_reason(whole, through))
    if not through.startswith(before):
        raise unproved(number, _DIFFERS)
    tail = through[len(before) :]
    at, size, last_id = _answer(tail, turns[number], number, tokenizer)
    _check_thoughts(turns[number], number, tail[:at])
    if tail[:at].strip() and before == tokenizer.render(turns[:number], tools=tools):
        raise unproved(number, f"asked for the beginning of an answer it writes none, but in a finished chat it writes {tail[:at]!r}")
    end = len(before) + size
    if not whole.startswith(tail[:size], len(before)):
        raise unproved(number, _DIFFERS, hint=f"--set data.train_on=last learns the last answer of each chat alone, or {_OTHER}")
    return Span(len(before), end, last_id, end)


def marked_spans(turns: Turns, numbers: Sequence[int], text: str, marks: Sequence[tuple[int, int]], tokenizer: ChatTokenizer) -> list[Span]:
    """The stretches that the template marks for these assistant turns; raises Finding when they are not the turns and their ends."""
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(marks) != len(answers):
        reason = f"its generation marks enclose {len(marks)} stretches for {len(answers)} assistant turns"
        raise unproved(numbers[0], reason)
    spans = []
    for number in numbers:
        begin, end = marks[answers.index(number)]
        at, size, last_id = _answer(text[begin:end], turns[number], number, tokenizer)
        _check_thoughts(turns[number], number, text[begin : begin + at])
        after = tokenizer.added_token_at(text[end:].lstrip())
        if last_id is None and after is not None:
            raise unproved(number, f"its generation marks leave out {after}, so the model would never learn to end")
        spans.append(Span(begin, end if last_id is not None else begin + size, last_id, begin + size))
    return spans


def check_shown(turns: Turns, whole: str) -> None:
    """Finding when a tool call or a turn of the user, the system or a tool is not in the rendering: it would be dropped in silence."""
    for number, turn in enumerate(turns):
        missing = shown_calls(turn.get("tool_calls", ()), whole)
        if missing is not None:
            raise left_out(number, turn["role"], missing)
        longest = max((line.strip() for line in turn.get("content", "").splitlines()), key=len, default="")
        if turn["role"] != "assistant" and longest not in whole and _as_json(longest) not in whole:
            raise left_out(number, turn["role"])


def left_out(number: int, role: str, what: str = "the text") -> Finding:
    """What is said of a turn that the template does not write."""
    message = f"the model's chat template leaves out {what} of turn {number} ({role})"
    return Finding(
        "data.turn-left-out", message, hint="remove the turn, or --set model.chat_template=FILE.jinja with a template that writes it"
    )


def unproved(number: int, reason: str, *, hint: str | None = None) -> Finding:
    """What is said of an answer whose tokens cannot be told apart for certain."""
    message = f"it cannot be shown which tokens of turn {number} are learned: of the model's chat template, {reason}"
    return Finding("data.mask-unproved", message, hint=hint or _OTHER)


_DIFFERS = "it writes the turn differently once later turns follow"
_OTHER = "--set model.chat_template=FILE.jinja with a template that writes each turn the same everywhere, or --set data.train_on=all"


def _prompt_reason(whole: str, through: str) -> str:
    return "its generation prompt is not how it begins the turn in a finished chat" if whole.startswith(through) else _DIFFERS


def _answer(tail: str, turn: Mapping[str, Any], number: int, tokenizer: ChatTokenizer) -> tuple[int, int, int | None]:
    """Of text that begins with the answer: where its own words begin, how long it is with its end token, and that token."""
    content = turn.get("content", "").strip()
    if turn.get("tool_calls"):
        return _calls(tail, turn, number, tokenizer)
    found = -1
    while (found := tail.find(content, found + 1)) >= 0:
        stop = found + len(content)
        rest = tail[stop:].lstrip()
        end = tokenizer.added_token_at(rest)
        if end is not None:
            return found, len(tail) - len(rest) + len(end), tokenizer.added_tokens[end]
        if not rest:
            return found, stop, None
    for end, stop in _trailing_ends(tail, tokenizer):
        if _squeezed(tail[: stop - len(end)]) == _squeezed(content):
            return 0, stop, tokenizer.added_tokens[end]
    found = tail.find(content)
    if found < 0:
        raise unproved(number, f"it changes the assistant's text, which becomes {tail.lstrip()[:60]!r}")
    rest = tail[found + len(content) :].lstrip()
    raise unproved(number, f"after the assistant's text it writes {rest[:30]!r}, which is not a token that ends a turn")


def _check_thoughts(turn: Mapping[str, Any], number: int, lead: str) -> None:
    if _squeezed(turn.get("reasoning_content", "")) not in _squeezed(lead):
        raise unproved(number, "it leaves out the thoughts before the answer")


def _calls(tail: str, turn: Mapping[str, Any], number: int, tokenizer: ChatTokenizer) -> tuple[int, int, int | None]:
    """The same of a turn with tool calls, each of which must be written with its name and all its arguments."""
    ends = list(_trailing_ends(tail, tokenizer))
    usual = [end for end in ends if tokenizer.added_tokens[end[0]] in tokenizer.end_ids]
    control = [end for end in ends if end[0] in tokenizer.control_tokens]
    chosen = (usual or control)[-1:]
    stop = chosen[0][1] if chosen else len(tail.rstrip())
    missing = shown_calls(turn["tool_calls"], tail[:stop])
    if missing is not None:
        raise left_out(number, turn["role"], missing)
    if _squeezed(turn.get("content", "")) not in _squeezed(tail[:stop]):
        raise unproved(number, "beside tool calls it leaves out the turn's text")
    if not chosen and tokenizer.turn_end is not None:
        raise unproved(number, "it writes no token that ends the turn after a tool call")
    return 0, stop, tokenizer.added_tokens[chosen[0][0]] if chosen else None


def _trailing_ends(tail: str, tokenizer: ChatTokenizer) -> Iterator[tuple[str, int]]:
    """The added tokens with which the text ends, the last first, each with where it stops; white space between them does not count."""
    while (end := tokenizer.added_token_before(tail := tail.rstrip())) is not None:
        yield end, len(tail)
        tail = tail[: -len(end)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
