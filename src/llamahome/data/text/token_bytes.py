"""The bytes of each token of a vocabulary: a fast way to verify that tokens are exactly a text, and to find where each token ends.

The bytes of the tokens are joined and compared with the text, which needs neither offsets nor a decoder. A tokenizer whose text differs
from the bytes of its tokens (it puts a space before the text, or normalizes Unicode) never compares equal here. Cost: one pass over the
vocabulary, then one join per text.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """The bytes of every token."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._bytes_of = list(table).__getitem__
        self._lengths = np.fromiter((len(item) for item in table), np.int64, len(table))

    def equal(self, ids: Sequence[int], text: bytes) -> bool:
        """Whether the joined bytes of the tokens are this text."""
        return b"".join(map(self._bytes_of, ids)) == text

    def ends(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64 [n]: the offset in bytes after each token."""
        return np.cumsum(self._lengths[ids])


def read_token_bytes(backend: Any) -> TokenBytes | None:
    """The bytes of every token of a `tokenizers.Tokenizer`; None if the type of its decoder is not supported."""
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
    return TokenBytes(table)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _space(steps: list[dict[str, Any]]) -> str:
    """The character that tokens have instead of a space."""
    for step in steps:
        if step["type"] == "Metaspace":
            return str(step["replacement"])
        if step["type"] == "Replace" and step["content"] == " ":
            return str(step["pattern"].get("String", " "))
    return " "


def _byte_letters() -> dict[int, int]:
    """The letter that byte-level BPE has for each byte: printable Latin-1 as itself, the others from 256 on (introduced by GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {letter: letter for letter in printable} | {256 + number: byte for number, byte in enumerate(others)}


def _from_letters(token: str, letters: dict[int, int]) -> bytes:
    try:
        return token.translate(letters).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()
