"""The skeleton of a chat: what a template writes around the texts of a chat of a given shape. It is found once per shape.

A shape is the sequence of roles. Its skeleton is found by rendering markers instead of the texts, and its answers are verified there
(spans.find_span). A row fits the skeleton if its own rendering is exactly the skeleton with the row's texts; then the spans of its answers
follow from the skeleton, and the row is rendered only once. A row that does not fit, because the template depends on its texts, is
verified by itself.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.data.rows.row_error import RowError
from llamahome.data.text.spans import Span, find_span, left_out
from llamahome.data.text.tokens import ChatTokenizer

Shape = tuple[tuple[str, bool], ...]
"""The role of each turn, and whether it has text."""
_MARKER = re.compile("\ue000([0-9]+)\ue001")
_PLAIN = {"role", "content"}
_MAX_SHAPES = 2048
"""How many shapes are kept per tokenizer: chats of one to a thousand questions, with and without a system turn."""
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.lstrip, str.rstrip, str.strip)
"""What templates do to the white space around a text; the first one that gives the rendering is used."""


@dataclass(frozen=True)
class _AnswerSlot:
    """An answer relative to its text: how many characters of the skeleton before and after it are targets too, and its last token."""

    lead: int
    trail: int
    last_id: int | None


@dataclass(frozen=True)
class TemplateSkeleton:
    """A rendering is pieces[0], text, pieces[1], text, ..., pieces[-1]."""

    pieces: tuple[str, ...]
    slots: tuple[int, ...]
    """The turn whose text follows each piece but the last."""
    trims: tuple[Callable[[str], str], ...]
    """How the white space around each text is trimmed."""
    answers: dict[int, _AnswerSlot | RowError]
    """For each assistant turn its slot, or why its span cannot be verified."""

    def spans(self, turns: Sequence[dict[str, Any]], numbers: Sequence[int], text: str) -> list[Span] | None:
        """The spans of these assistant turns in `text`; None if it is not this skeleton with these turns. Raises RowError."""
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
            slot = self.answers[number]
            if isinstance(slot, RowError):
                raise slot
            begin, end = begins[number]
            spans.append(Span(begin - slot.lead, end + slot.trail, slot.last_id, end + slot.trail))
        return spans


def find_skeleton(turns: Sequence[dict[str, Any]], tokenizer: ChatTokenizer) -> TemplateSkeleton | None:
    """The skeleton for chats of this shape; None if it has none. Raises RowError if the template leaves out a turn."""
    shape = tuple((turn["role"], bool(turn["content"])) if turn.keys() == _PLAIN else ("", False) for turn in turns)
    if ("", False) in shape:
        return None
    known: dict[Shape, TemplateSkeleton | RowError | None] = tokenizer.skeletons
    if shape not in known:
        if len(known) >= _MAX_SHAPES:
            known.clear()
        known[shape] = _find(shape, tokenizer)
    skeleton = known[shape]
    if isinstance(skeleton, RowError):
        raise skeleton
    return skeleton


def _find(shape: Shape, tokenizer: ChatTokenizer) -> TemplateSkeleton | RowError | None:
    marked = [_turn(role, f"\ue000{number}\ue001" if text else "") for number, (role, text) in enumerate(shape)]
    try:
        chat_text = tokenizer.render(marked)
    except RowError:
        return None
    parts = _MARKER.split(chat_text)
    pieces, slots = tuple(parts[::2]), tuple(int(number) for number in parts[1::2])
    for number, (role, text) in enumerate(shape):
        if text and role != "assistant" and number not in slots:
            return left_out(number, role)
    trims = _trims(shape, pieces, slots, tokenizer)
    if trims is None or len(set(slots)) < len(slots):
        return None
    answers = {number: _answer_slot(marked, number, chat_text, tokenizer) for number, (role, _) in enumerate(shape) if role == "assistant"}
    return TemplateSkeleton(pieces, slots, trims, answers)


def _answer_slot(marked: list[dict[str, Any]], number: int, chat_text: str, tokenizer: ChatTokenizer) -> _AnswerSlot | RowError:
    try:
        span = find_span(marked, number, chat_text, tokenizer)
    except RowError as error:
        return error
    marker = marked[number]["content"]
    begin = chat_text.index(marker)
    return _AnswerSlot(begin - span.begin, span.end - begin - len(marker), span.last_id)


def _trims(
    shape: Shape, pieces: tuple[str, ...], slots: tuple[int, ...], tokenizer: ChatTokenizer
) -> tuple[Callable[[str], str], ...] | None:
    """How the template trims each text, found with markers that have white space around them."""
    spaced = [_turn(role, f" \n\t\ue000{number}\ue001\t \n" if text else "") for number, (role, text) in enumerate(shape)]
    try:
        chat_text = tokenizer.render(spaced)
    except RowError:
        return None
    trims, at = [], 0
    for piece, number in zip(pieces, slots, strict=False):
        at += len(piece)
        trim = next((trim for trim in _TRIMS if chat_text.startswith(trim(spaced[number]["content"]), at)), None)
        if trim is None:
            return None
        trims.append(trim)
        at += len(trim(spaced[number]["content"]))
    return tuple(trims)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
