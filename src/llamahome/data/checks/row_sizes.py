"""The numbers that are kept of every row, as arrays: duplicates, outliers and `data stats` are computed from them.

Memory: about 140 bytes per row, and 512 more to find near duplicates; no text is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from llamahome.data.checks.findings import RowLocation
from llamahome.data.text.targets import Encoded, Tokenized

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
"""The values of data.max_length for which `data stats` shows what they would cut."""


@dataclass(frozen=True)
class RowSizes:
    """One element per row. Without a tokenizer all token counts are 0; of a refused row only the location is known."""

    files: NDArray[np.int32]
    """Index of the row's file in the paths of the source."""
    rows: NDArray[np.int64]
    lines: NDArray[np.int64]
    usable: NDArray[np.bool_]
    """Rows that are not refused."""
    hashes: NDArray[np.uint64]
    """Equal for rows that differ only in white space."""
    characters: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Before data.max_length is applied."""
    needed: NDArray[np.int64]
    """The data.max_length that keeps all of the row: `tokens`, or of a pair the longer answer with its prompt."""
    targets: NDArray[np.int64]
    kept_tokens: NDArray[np.int64]
    """What a run trains on: after data.max_length is applied, without examples that have no target."""
    kept_targets: NDArray[np.int64]
    beyond: NDArray[np.int64]
    """[n, len(LENGTHS)]: targets beyond each length."""
    signatures: NDArray[np.uint64]
    """[n, PERMUTATIONS], or [n, 0] if near duplicates are not searched for."""
    endings: NDArray[np.int8]
    """How the last answer ends, from answer_quality.end_class."""
    answered: NDArray[np.uint64]
    """Length and hash of the last answer, from answer_quality.answer_mark."""
    answer_tokens: NDArray[np.int64]
    """Tokens of the last answer before its end token; 0 for a plain text."""
    languages: NDArray[np.str_]
    """Empty if the language is not clear or not identified."""

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, number: int, paths: Sequence[str]) -> RowLocation:
        """The location of row `number`."""
        return RowLocation(paths[int(self.files[number])], int(self.rows[number]), int(self.lines[number]))


def join_sizes(parts: Sequence[RowSizes]) -> RowSizes:
    """The rows of all parts, of which there is at least one, in order."""
    width = max(part.signatures.shape[1] for part in parts)
    joined = {field.name: [getattr(part, field.name) for part in parts] for field in fields(RowSizes)}
    for at, part in enumerate(parts):  # a block of refused rows has no signatures
        if part.signatures.shape[1] < width:
            joined["signatures"][at] = np.zeros((len(part), width), np.uint64)
    return RowSizes(**{name: np.concatenate(arrays) for name, arrays in joined.items()})


@dataclass(slots=True)
class RowSize:
    """The numbers of one row. Not frozen, because one is made for every row and freezing takes time."""

    file: int
    row: int
    line: int
    usable: bool = False
    hash: int = 0
    characters: int = 0
    ending: int = 0
    answered: int = 0
    answer_tokens: int = 0
    tokenized: Sequence[Tokenized] = ()
    """One, or the two answers of a pair."""
    encoded: Encoded | None = None
    signature: NDArray[np.uint64] | None = None
    language: str = ""


def as_arrays(rows: Sequence[RowSize]) -> RowSizes:
    """The numbers of these rows as arrays."""
    width = max((len(row.signature) for row in rows if row.signature is not None), default=0)
    signatures = np.zeros((len(rows), width), np.uint64)
    beyond = np.zeros((len(rows), len(LENGTHS)), np.int64)
    kept = np.zeros((2, len(rows)), np.int64)
    for number, row in enumerate(rows):
        if row.signature is not None:
            signatures[number] = row.signature
        if row.encoded is not None:
            trained = [example for example in row.encoded.examples if example.targets.any()]
            kept[:, number] = sum(len(example.tokens) for example in trained), sum(int(example.targets.sum()) for example in trained)
        for tokenized in row.tokenized:
            if len(tokenized.tokens) > LENGTHS[0]:
                beyond[number] += [int(tokenized.targets[length:].sum()) for length in LENGTHS]
    return RowSizes(
        files=np.array([row.file for row in rows], np.int32),
        rows=np.array([row.row for row in rows], np.int64),
        lines=np.array([row.line for row in rows], np.int64),
        usable=np.array([row.usable for row in rows], np.bool_),
        hashes=np.array([row.hash for row in rows], np.uint64),
        characters=np.array([row.characters for row in rows], np.int64),
        tokens=np.array([row.encoded.num_tokens if row.encoded else 0 for row in rows], np.int64),
        needed=np.array([row.encoded.needed if row.encoded else 0 for row in rows], np.int64),
        targets=np.array([row.encoded.num_targets if row.encoded else 0 for row in rows], np.int64),
        kept_tokens=kept[0],
        kept_targets=kept[1],
        beyond=beyond,
        signatures=signatures,
        endings=np.array([row.ending for row in rows], np.int8),
        answered=np.array([row.answered for row in rows], np.uint64),
        answer_tokens=np.array([row.answer_tokens for row in rows], np.int64),
        languages=np.array([row.language for row in rows], np.str_),
    )
