"""The turns of a chat that the tokenizer's own template rendered up to a question, read back and proved by rendering them again."""

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from llamahome.data.rows.row_error import RowError
from llamahome.data.text.tokens import ChatTokenizer

_MARKER = re.compile("\ue000([0-9]+)\ue001")
_MOST_ANSWERS = 64
"""Answers before the question."""


def turns_of(text: str, tokenizer: ChatTokenizer) -> list[dict[str, Any]] | None:
    """The turns, of which the last one asks; None if the template does not render exactly this text from them.

    Costs four renderings for each number of answers that is tried, and one more for what fits.
    """
    for answers in range(_MOST_ANSWERS + 1):
        fits = False
        for lead, prompt in product(((), ("system",)), (True, False)):
            roles = (*lead, *("user", "assistant") * answers, "user")
            pieces = _pieces(roles, tokenizer, prompt=prompt)
            if pieces is None or sum(map(len, pieces)) > len(text):
                continue
            fits = True
            if (turns := _read(text, roles, pieces, tokenizer, prompt=prompt)) is not None:
                return turns
        if not fits:
            return None
    return None


def _pieces(roles: Sequence[str], tokenizer: ChatTokenizer, *, prompt: bool) -> list[str] | None:
    """What the template writes around the texts of a chat of these roles; None if it does not write each of them once, in order."""
    marked = [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]
    try:
        parts = _MARKER.split(tokenizer.render(marked, add_generation_prompt=prompt))
    except RowError:
        return None
    return parts[::2] if parts[1::2] == [str(number) for number in range(len(roles))] else None


def _read(text: str, roles: Sequence[str], pieces: Sequence[str], tokenizer: ChatTokenizer, *, prompt: bool) -> list[dict[str, Any]] | None:
    parts = _between(text, pieces)
    marks = [piece.strip() for piece in pieces if piece.strip()]
    if parts is None or any(tokenizer.control_token_in(part) is not None or any(mark in part for mark in marks) for part in parts):
        return None  # another number of turns
    turns = [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]
    try:
        return turns if tokenizer.render(turns, add_generation_prompt=prompt) == text else None
    except RowError:
        return None


def _between(text: str, pieces: Sequence[str]) -> list[str] | None:
    """What stands between the pieces, each of them where it comes first; None if they are not there in this order."""
    first, *inner, last = pieces
    if not text.startswith(first) or not text.endswith(last):
        return None
    parts, begin, end = list[str](), len(first), len(text) - len(last)
    for piece in inner:
        if (at := text.find(piece, begin, end)) < 0:
            return None
        parts.append(text[begin:at])
        begin = at + len(piece)
    return [*parts, text[begin:end]] if begin <= end else None
