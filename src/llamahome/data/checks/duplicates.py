"""Rows that say the same: by a hash but for white space, nearly the same by MinHash when the extra `quality` (datasketch) is there.

Memory: 8 bytes a row for equal ones, about 3 kB a row for near ones. MinHash: Broder, On the resemblance and containment of documents
(1997), over stretches of five words. Measured: 7,900 rows a second of 766 bytes to signatures, 87,000 a second looked up.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llamahome.data.records import Conversation

_WHITE = b" \t\n\v\f\r"
PERMUTATIONS = 64
NEAR = 0.85
"""Share of stretches of words in common from which two rows are nearly the same."""
MOST_ROWS = 200_000
"""Rows among which near duplicates are looked for; bounds the memory at about 1 GB."""
_SCHEME: Literal["affine32"] = "affine32"
"""How datasketch permutes hashes of 32 bits."""
_STRETCH = 5
_BAND, _BUCKET = 6, 20
_READ, _DOUBT = 3, 0.14
"""Earlier rows that are read for one row, and how far a signature may be off: three standard deviations of 64 values at 0.85."""
_Buckets = dict[bytes, list[int]]
"""Rows by a band of their signatures."""
_FEWEST = 20
"""Words below which a row is too short to be nearly the same as another: one word is a large share of it."""


def said(conversation: Conversation) -> str:
    """Everything that the conversation says, as one text."""
    if conversation.text is not None:
        return conversation.text
    return "\n".join([turn["content"] for turn in conversation.turns if "content" in turn])


def exchanged(conversation: Conversation) -> str:
    """What is asked and answered, as one text: without what a system turn says to every row alike."""
    if conversation.text is not None:
        return conversation.text
    spoken = [turn["content"] for turn in conversation.turns if turn["role"] != "system" and "content" in turn]
    return "\n".join(spoken)


def answers(conversation: Conversation) -> str:
    """What is learned of the conversation, as one text."""
    if conversation.text is not None:
        return conversation.text
    numbered = enumerate(conversation.turns)
    learned = [turn for number, turn in numbered if turn["role"] == "assistant" and number not in conversation.context_only]
    return "\n".join(turn["content"] for turn in learned if "content" in turn)


def content_key(conversation: Conversation) -> int:
    """64 bits of BLAKE2b over what the conversation says and who says it, without its white space."""
    letters = "\0".join(_parts(conversation)).encode("utf-8").translate(None, _WHITE)
    return int.from_bytes(hashlib.blake2b(letters, digest_size=8).digest(), "big")


def same_letters(one: Conversation, other: Conversation) -> bool:
    """Whether two conversations of one key are equal in their white space too."""
    return _parts(one) == _parts(other)


def _parts(conversation: Conversation) -> list[str]:
    if conversation.text is not None:
        return [conversation.text]
    parts: list[str] = []
    for turn in conversation.turns:
        parts += (turn["role"], turn.get("content", ""))
        if len(turn) > 2:  # calls of tools and the like
            parts.append(
                json.dumps({key: part for key, part in turn.items() if key not in ("role", "content")}, sort_keys=True, default=str)
            )
    if conversation.context_only:
        parts.append(str(sorted(conversation.context_only)))
    if conversation.tools:
        parts.append(json.dumps(conversation.tools, sort_keys=True, default=str))
    return parts


def repeats(hashes: NDArray[np.uint64], usable: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Rows with the hash of an earlier usable row, as (row, the first row of that hash), in the order of the rows."""
    rows = np.flatnonzero(usable)
    _, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
    again = np.flatnonzero(first[group] != np.arange(len(rows)))
    return list(zip(rows[again].tolist(), rows[first[group[again]]].tolist(), strict=True))


def near_known() -> bool:
    """Whether the package that finds near duplicates is installed."""
    return find_spec("datasketch") is not None


def open_signer() -> Callable[[str], NDArray[np.uint64]]:
    """A function from a text to its MinHash signature; all zeros for a text that is too short for one."""
    from datasketch import MinHash

    def sign(text: str) -> NDArray[np.uint64]:
        found = stretches(text)
        if not found:
            return np.zeros(PERMUTATIONS, np.uint64)
        made = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32, scheme=_SCHEME)
        made.update_batch(stretch.encode("utf-8") for stretch in found)
        return np.asarray(made.hashvalues, np.uint64)

    return sign


def stretches(text: str) -> set[str]:
    """Every five words in a row; none of a text of few words."""
    words = text.split()
    return {" ".join(words[at : at + _STRETCH]) for at in range(len(words) - _STRETCH + 1)} if len(words) >= _FEWEST else set()


def in_common(one: str, other: str) -> float:
    """Stretches of two texts that are in both, over those in either."""
    first, second = stretches(one), stretches(other)
    return len(first & second) / max(1, len(first | second))


def near_repeats(
    signatures: NDArray[np.uint64], skipped: set[int], shared: Callable[[int, int], float]
) -> Iterator[tuple[int, int, float]]:
    """Rows nearly the same as an earlier one: (row, that row, the share in common); rows of `skipped` are left out.

    Signatures only propose: `shared` reads two rows and tells their true share. Rows that agree in one of 10 bands of 6 values are
    proposed, 99 % of those with 0.85 in common. A bucket keeps its first 20 rows, so that rows of one mould cost no more than others.
    """
    buckets: _Buckets = {}
    for row in np.flatnonzero(signatures.any(axis=1)).tolist():
        if row in skipped:
            continue
        keys = _keys(signatures[row])
        share, other = _nearest(row, signatures[row], keys, buckets, signatures, shared)
        if share >= NEAR:
            yield row, other, share
        _add(row, keys, buckets)


def near_across(
    signatures: NDArray[np.uint64], others: NDArray[np.uint64], shared: Callable[[int, int], float]
) -> Iterator[tuple[int, int, float]]:
    """Rows nearly the same as one of the others: (row, the other, the share in common), found and read as in near_repeats."""
    buckets: _Buckets = {}
    for other in np.flatnonzero(others.any(axis=1)).tolist():
        _add(other, _keys(others[other]), buckets)
    for row in np.flatnonzero(signatures.any(axis=1)).tolist() if buckets else ():
        share, other = _nearest(row, signatures[row], _keys(signatures[row]), buckets, others, shared)
        if share >= NEAR:
            yield row, other, share


def _keys(signature: NDArray[np.uint64]) -> list[bytes]:
    """The bands of a signature, each with its number."""
    return [bytes([band]) + signature[band * _BAND : (band + 1) * _BAND].tobytes() for band in range(PERMUTATIONS // _BAND)]


def _add(row: int, keys: list[bytes], buckets: _Buckets) -> None:
    for key in keys:
        bucket = buckets.setdefault(key, [])
        if len(bucket) < _BUCKET:
            bucket.append(row)


def _nearest(
    row: int,
    own: NDArray[np.uint64],
    keys: list[bytes],
    buckets: _Buckets,
    others: NDArray[np.uint64],
    shared: Callable[[int, int], float],
) -> tuple[float, int]:
    """The true share in common with the nearest row of the buckets, and which it is; (0, 0) where none is likely."""
    proposed = sorted({other for key in keys for other in buckets.get(key, ())})
    if not proposed:
        return 0.0, 0
    estimates = (others[proposed] == own).mean(axis=1)
    likely = [at for at in np.argsort(-estimates, kind="stable")[:_READ].tolist() if estimates[at] >= NEAR - _DOUBT]
    share, other = max(((shared(row, proposed[at]), -proposed[at]) for at in likely), default=(0.0, 0))
    return share, -other
