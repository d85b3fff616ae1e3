"""The size of every row in numbers, laid out as arrays: what duplicates, outliers and `data stats` are computed from.

Memory: about 130 bytes a row (and 512 where near duplicates are looked for); no text is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from llamahome.data.checks.findings import Place
from llamahome.data.text.targets import Encoded, Tokenized

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
"""Values of data.max_length of which `data stats` tells what they would cut."""


@dataclass(frozen=True)
class Facts:
    """Figures of rows, one element each. Without a tokenizer all counts of tokens are 0; of a refused row only its place is known."""

    files: NDArray[np.int32]
    """Number of its file in the paths of the source."""
    rows: NDArray[np.int64]
    lines: NDArray[np.int64]
    usable: NDArray[np.bool_]
    """Rows that are not refused."""
    hashes: NDArray[np.uint64]
    """Equal for rows that say the same but for white space."""
    characters: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Before data.max_length is applied."""
    targets: NDArray[np.int64]
    kept_tokens: NDArray[np.int64]
    """What a run trains on: after data.max_length is applied, and none of an example without targets."""
    kept_targets: NDArray[np.int64]
    beyond: NDArray[np.int64]
    """[n, len(LENGTHS)]: targets beyond each length."""
    signatures: NDArray[np.uint64]
    """[n, PERMUTATIONS], or [n, 0] when near duplicates are not looked for."""
    endings: NDArray[np.int8]
    """How the last answer ends, as learned.end_class tells."""
    languages: NDArray[np.str_]
    """Empty where it is not clear or not looked for."""

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, number: int, paths: Sequence[str]) -> Place:
        """Where row `number` is."""
        return Place(paths[int(self.files[number])], int(self.rows[number]), int(self.lines[number]))


def join_facts(parts: Sequence[Facts]) -> Facts:
    """The figures of all parts, in their order; there must be one."""
    width = max(part.signatures.shape[1] for part in parts)
    joined = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Facts)}
    for at, part in enumerate(parts):  # a stretch of refused rows has no signatures
        if part.signatures.shape[1] < width:
            joined["signatures"][at] = np.zeros((len(part), width), np.uint64)
    return Facts(**{name: np.concatenate(arrays) for name, arrays in joined.items()})


@dataclass(slots=True)
class Measured:
    """The figures of one row, before they are laid out. Not frozen: one is made for every row."""

    file: int
    row: int
    line: int
    usable: bool = False
    hash: int = 0
    characters: int = 0
    ending: int = 0
    whole: Tokenized | None = None
    encoded: Encoded | None = None
    signature: NDArray[np.uint64] | None = None
    language: str = ""


def lay_out(rows: Sequence[Measured]) -> Facts:
    """The figures of these rows as arrays."""
    width = max((len(row.signature) for row in rows if row.signature is not None), default=0)
    signatures = np.zeros((len(rows), width), np.uint64)
    beyond = np.zeros((len(rows), len(LENGTHS)), np.int64)
    kept = np.zeros((2, len(rows)), np.int64)
    for number, row in enumerate(rows):
        if row.signature is not None:
            signatures[number] = row.signature
        if row.encoded is not None:
            taught = [example for example in row.encoded.examples if example.targets.any()]
            kept[:, number] = sum(len(example.tokens) for example in taught), sum(int(example.targets.sum()) for example in taught)
        if row.whole is not None and len(row.whole.tokens) > LENGTHS[0]:
            beyond[number] = [int(row.whole.targets[length:].sum()) for length in LENGTHS]
    return Facts(
        files=np.array([row.file for row in rows], np.int32),
        rows=np.array([row.row for row in rows], np.int64),
        lines=np.array([row.line for row in rows], np.int64),
        usable=np.array([row.usable for row in rows], np.bool_),
        hashes=np.array([row.hash for row in rows], np.uint64),
        characters=np.array([row.characters for row in rows], np.int64),
        tokens=np.array([row.encoded.num_tokens if row.encoded else 0 for row in rows], np.int64),
        targets=np.array([row.encoded.num_targets if row.encoded else 0 for row in rows], np.int64),
        kept_tokens=kept[0],
        kept_targets=kept[1],
        beyond=beyond,
        signatures=signatures,
        endings=np.array([row.ending for row in rows], np.int8),
        languages=np.array([row.language for row in rows], np.str_),
    )
