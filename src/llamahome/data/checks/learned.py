"""Answers that teach nothing or the wrong thing: empty, boilerplate, or cut in the middle.

Only whole answers and their beginnings and ends are looked at, so that an answer that quotes such words is left alone. The rules are few
and meant to miss rather than to accuse. An answer that just stops can only be told beside others: `open_end` gives its class.
"""

import re
from collections.abc import Iterator
from typing import Literal

from llamahome.data.checks.findings import Found, Place
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.records import Conversation
from llamahome.errors import Problem

_CLOSED, _OPEN = 1, 2
_LONG = 20
"""Words from which an answer is prose that ends in a punctuation mark; shorter ones are labels, titles and names."""

_THOUGHT = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.S)
_NOTHING = re.compile(r"[\s.…\-–—_*#'\"`\u200b-\u200f\u2060\ufeff]*\Z")
_CANNOT = r"i(?:'m| am) (?:unable|not able) to|i (?:can't|cannot|can not|could not|couldn't|won't|will not)"
_REQUEST = r"(?:fulfil|fulfill|comply with|assist with|assist you|help with|help you with|complete) (?:this|that|your|the|such|with)\b"
_BEGINS = re.compile(
    r"(?:(?:i(?:'m| am) )?(?:very |so |truly )?(?:sorry|apologi[sz]e)[,.]?(?: but)? |unfortunately, )?"
    r"(?:as an? (?:ai|artificial intelligence|(?:large )?language model)(?: language)?(?: model| assistant| chatbot)?\s*[,.;:(]"
    r"|as an? (?:ai|artificial intelligence|large language model|language model)(?: language)?(?: model| assistant)?,? i\b"
    rf"|(?:{_CANNOT}) {_REQUEST})"
    r"|lorem ipsum\b"
)
_NAME = r"(?:[a-z]+[ _.])*(?:answer|response|completion|output|reply|assistant|solution)(?:[ _.][a-z0-9]+)*"
_LEFT = re.compile(
    rf"\$?\{{{{?\s*{_NAME}\s*\}}}}?|%\({_NAME}\)s|<(?:answer|response|completion)>"
    rf"|[<\[](?:insert|enter|add|write|put|your)\b[ _][^<>\[\]\n]{{0,60}}[>\]]"
)
_STUBS = re.compile(r"(?:todo|tbd|fixme|n/a|nan|placeholder|to be (?:done|added|written|filled in))[.!:]?")
_FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})(.*)$", re.M)


def weak_answers(conversation: Conversation, place: Place, *, train_on: Literal["assistant", "all", "last"]) -> Iterator[Found]:
    """A warning for the first learned answer of each kind: empty, boilerplate, or an end that is surely open."""
    seen: set[str] = set()
    for text in learned_answers(conversation, train_on=train_on):
        told = _weak(text)
        if told is None or told[0] in seen:
            continue
        code, message, hint = told
        seen.add(code)
        yield Found("warning", Problem(code=code, message=message, where=place.where, excerpt=excerpt(text, place.line), hint=hint), place)


def learned_answers(conversation: Conversation, *, train_on: Literal["assistant", "all", "last"]) -> list[str]:
    """The texts that are learned as answers; a turn that calls a tool and says nothing is none."""
    if conversation.text is not None:
        return [conversation.text]
    numbered = [(at, turn) for at, turn in enumerate(conversation.turns) if turn["role"] == "assistant"]
    chosen = numbered[-1:] if train_on == "last" else numbered
    texts = [(turn.get("content") or "", len(turn) > 2) for at, turn in chosen if at not in conversation.context_only]
    return [text for text, calls in texts if text.strip() or not calls]


def end_class(conversation: Conversation) -> int:
    """How the last answer ends: 0 no telling (short, at its end a list, table or code, or a script without capitals), 1 closed, 2 open."""
    last = learned_answers(conversation, train_on="last")[-1:]
    text = last[0].rstrip() if last else ""
    if len(text.split()) < _LONG:
        return 0
    line = text.rsplit("\n", 1)[-1]
    if line.lstrip()[:1] in ("-", "*", "+", "|", "#", "`", "~", "<") or line[:1] in (" ", "\t") or re.match(r"\s*\d+[.)]", line):
        return 0
    if text[-1].isalpha() and text[-1].lower() == text[-1].upper():
        return 0
    return _OPEN if text[-1] in ",-–(" or text[-1].isalpha() else _CLOSED


def _weak(text: str) -> tuple[str, str, str] | None:
    """Code, message and hint of what is wrong with one answer."""
    thought = _THOUGHT.match(text)
    rest = text[thought.end() :] if thought else text
    if _NOTHING.match(rest):
        said = "nothing follows the thoughts in the answer" if thought else "the answer holds no word, digit or symbol"
        return "data.empty-answer", f"{said}, and the model learns to say just that", "remove the row, unless it is meant"
    plain = re.sub(r"\s+", " ", rest[:400].replace("’", "'")).strip().lower()
    whole = len(rest.strip()) <= 100
    if (whole and (_LEFT.fullmatch(plain) or _STUBS.fullmatch(plain))) or _BEGINS.match(plain):
        kind = "is a placeholder" if whole and not _BEGINS.match(plain) else "begins like boilerplate"
        return "data.boilerplate-answer", f"the answer {kind}, which the model learns to say", "remove the row, unless it is meant"
    if _open_fence(rest):
        return "data.cut-answer", "the answer may be cut: its last code fence is not closed", "read the original again, or remove the row"
    return None


def _open_fence(text: str) -> bool:
    """Whether a code fence of Markdown is open at the end; a closing one has the same mark, is as long, and nothing follows it."""
    mark = ""
    for found in _FENCE.finditer(text):
        fence, after = found[1], found[2].strip()
        if not mark:
            if "`" not in after or fence[0] == "~":
                mark = fence
        elif fence[0] == mark[0] and len(fence) >= len(mark) and not after:
            mark = ""
    return bool(mark)
