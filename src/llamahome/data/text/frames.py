"""The frame of a chat: what a template writes around the texts of a chat of a given shape, learned once, so that rows render once.

A shape is the sequence of roles. Its frame is found by rendering marker words in the place of the texts, and its answers are proved there
(spans.find_span). A row fits its frame when its own rendering is exactly the frame with the row's texts in it, character for character;
then its answers lie where the frame's do. A row that does not fit (the template looked into its texts) is proved by itself.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.data.rows.fault import Finding
from llamahome.data.text.spans import Span, find_span, left_out
from llamahome.data.text.tokens import ChatTokenizer

Shape = tuple[tuple[str, bool], ...]
"""Role of each turn, and whether it has any text."""
_MARKER = re.compile("\ue000([0-9]+)\ue001")
_PLAIN = {"role", "content"}
_MOST = 2048
"""Shapes remembered per tokenizer: chats of one to a thousand questions, with and without a system turn."""
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.lstrip, str.rstrip, str.strip)
"""What templates do to the white space around a text; the first one that explains a rendering is taken."""


@dataclass(frozen=True)
class _Place:
    """An answer relative to its text: characters of the frame before and after it that are learned too, and its last token."""

    lead: int
    trail: int
    last_id: int | None


@dataclass(frozen=True)
class Frame:
    """What is written around the texts: pieces[0], text, pieces[1], text, ..., pieces[-1]."""

    pieces: tuple[str, ...]
    slots: tuple[int, ...]
    """Number of the turn whose text stands after each piece but the last."""
    trims: tuple[Callable[[str], str], ...]
    """What is done to the text of each slot first."""
    answers: dict[int, _Place | Finding]
    """For each assistant turn its place, or why it cannot be told."""

    def spans(self, turns: Sequence[dict[str, Any]], numbers: Sequence[int], text: str) -> list[Span] | None:
        """Where these assistant turns lie in `text`; None when it is not this frame around these turns. Raises Finding."""
        at = 0
        begins: dict[int, tuple[int, int]] = {}
        for piece, number, trim in zip(self.pieces, self.slots, self.trims, strict=False):
            content = trim(turns[number]["content"])
            if not text.startswith(piece, at):
                return None
            at += len(piece)
            if not text.startswith(content, at):
                return None
            begins[number] = at, at + len(content)
            at += len(content)
        if text[at:] != self.pieces[-1]:
            return None
        spans = []
        for number in numbers:
            place = self.answers[number]
            if isinstance(place, Finding):
                raise place
            begin, end = begins[number]
            spans.append(Span(begin - place.lead, end + place.trail, place.last_id, end + place.trail))
        return spans


def find_frame(turns: Sequence[dict[str, Any]], tokenizer: ChatTokenizer) -> Frame | None:
    """The frame for chats of this shape; None when it has none. Raises Finding when a turn of the shape is left out."""
    shape = tuple((turn["role"], bool(turn["content"])) if turn.keys() == _PLAIN else ("", False) for turn in turns)
    if ("", False) in shape:
        return None
    known: dict[Shape, Frame | Finding | None] = tokenizer.frames
    if shape not in known:
        if len(known) >= _MOST:
            known.clear()
        known[shape] = _learn(shape, tokenizer)
    found = known[shape]
    if isinstance(found, Finding):
        raise found
    return found


def _learn(shape: Shape, tokenizer: ChatTokenizer) -> Frame | Finding | None:
    marked = [_turn(role, f"\ue000{number}\ue001" if text else "") for number, (role, text) in enumerate(shape)]
    try:
        whole = tokenizer.render(marked)
    except Finding:
        return None
    parts = _MARKER.split(whole)
    pieces, slots = tuple(parts[::2]), tuple(int(number) for number in parts[1::2])
    for number, (role, text) in enumerate(shape):
        if text and role != "assistant" and number not in slots:
            return left_out(number, role)
    trims = _trims(shape, pieces, slots, tokenizer)
    if trims is None or len(set(slots)) < len(slots):
        return None
    answers = {number: _place(marked, number, whole, tokenizer) for number, (role, _) in enumerate(shape) if role == "assistant"}
    return Frame(pieces, slots, trims, answers)


def _place(marked: list[dict[str, Any]], number: int, whole: str, tokenizer: ChatTokenizer) -> _Place | Finding:
    try:
        span = find_span(marked, number, whole, tokenizer)
    except Finding as finding:
        return finding
    word = marked[number]["content"]
    begin = whole.index(word)
    return _Place(begin - span.begin, span.end - begin - len(word), span.last_id)


def _trims(
    shape: Shape, pieces: tuple[str, ...], slots: tuple[int, ...], tokenizer: ChatTokenizer
) -> tuple[Callable[[str], str], ...] | None:
    """What the template does to the white space around each text, found with markers that have some."""
    spaced = [_turn(role, f" \n\t\ue000{number}\ue001\t \n" if text else "") for number, (role, text) in enumerate(shape)]
    try:
        whole = tokenizer.render(spaced)
    except Finding:
        return None
    found, at = [], 0
    for piece, number in zip(pieces, slots, strict=False):
        at += len(piece)
        trim = next((trim for trim in _TRIMS if whole.startswith(trim(spaced[number]["content"]), at)), None)
        if trim is None:
            return None
        found.append(trim)
        at += len(trim(spaced[number]["content"]))
    return tuple(found)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
