"""What each token of a vocabulary writes, in bytes: the cheap proof that tokens say exactly a text, and where in it each ends.

Tokens are joined and compared with the text, byte for byte, which needs neither offsets nor a decoder. A tokenizer that writes
something else than its tokens' bytes (a space put before the text, Unicode normalized) simply never proves equal here.
Cost: one pass over the vocabulary when built, then one join per text.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Spelling:
    """The bytes of every token."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._bytes_of = list(table).__getitem__
        self._lengths = np.fromiter((len(written) for written in table), np.int64, len(table))

    def writes(self, ids: Sequence[int], text: bytes) -> bool:
        """Whether the tokens, one after the other, are this text."""
        return b"".join(map(self._bytes_of, ids)) == text

    def ends(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64 [n]: the byte of the text after each token."""
        return np.cumsum(self._lengths[ids])


def read_spelling(backend: Any) -> Spelling | None:
    """The bytes of every token of a `tokenizers.Tokenizer`; None when its decoder is of a kind that is not known here."""
    if backend.decoder is None:
        return None
    steps = _steps(json.loads(backend.decoder.__getstate__()))
    kinds = {step["type"] for step in steps}
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    if kinds == {"ByteLevel"}:
        letters = _byte_letters()
        for token, number in vocabulary.items():
            table[number] = _from_letters(token, letters)
    elif kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        space = _space(steps)
        for token, number in vocabulary.items():
            byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
            table[number] = bytes([int(byte[1], 16)]) if byte else token.replace(space, " ").encode()
    else:
        return None
    for number, token in added.items():
        table[number] = token.content.encode()
    return Spelling(table)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _space(steps: list[dict[str, Any]]) -> str:
    """The character that a token has in the place of a space."""
    for step in steps:
        if step["type"] == "Metaspace":
            return str(step["replacement"])
        if step["type"] == "Replace" and step["content"] == " ":
            return str(step["pattern"].get("String", " "))
    return " "


def _byte_letters() -> dict[int, int]:
    """Byte-level BPE writes each byte as one letter: printable Latin-1 as itself, the others from 256 on (as GPT-2 began it)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {letter: letter for letter in printable} | {256 + number: byte for number, byte in enumerate(others)}


def _from_letters(token: str, letters: dict[int, int]) -> bytes:
    try:
        return token.translate(letters).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()
