"""Which rows are set aside for evaluation: by a hash of their content, so that the choice is stable and duplicates stay together."""

import hashlib
import json
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llamahome.data.records import Conversation

_SHARE, _LEAST, _FROM, _MOST = 0.02, 32, 320, 1000
"""The rule of eval_split auto, as its text in config/schema.py says it."""


def content_hash(conversation: Conversation) -> int:
    """64 bits of BLAKE2b over the turns or the text as canonical JSON; other keys of the row do not count."""
    content = conversation.text if conversation.text is not None else [[turn["role"], turn["content"]] for turn in conversation.turns]
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(canonical.encode("utf-8"), digest_size=8).digest(), "big")


def held_out(hashes: NDArray[np.uint64], split: float | Literal["auto"]) -> NDArray[np.bool_]:
    """Which rows are held out. All rows of one hash go the same way, and at least one hash always stays for training.

    A share takes the hashes below a threshold, so that a row never changes sides when others are added; a count takes the smallest hashes.
    """
    values, counts = np.unique(hashes, return_counts=True)
    if len(values) < 2 or split == 0:
        return np.zeros(len(hashes), np.bool_)
    if split == "auto":
        taken = _below(values, _SHARE)
        least = _LEAST if len(hashes) >= _FROM else 0
        if counts[:taken].sum() < least:
            taken = _smallest(counts, least)
        elif counts[:taken].sum() > _MOST:
            taken = _smallest(counts, _MOST)
    else:
        taken = _below(values, split) if split < 1 else _smallest(counts, int(split))
    taken = min(taken, len(values) - 1)
    return np.isin(hashes, values[:taken])


def _below(values: NDArray[np.uint64], share: float) -> int:
    return int(np.searchsorted(values, np.uint64(int(share * 2**64)), side="left"))


def _smallest(counts: NDArray[np.int64], rows: int) -> int:
    """How many of the smallest hashes hold `rows` rows or just more."""
    return int(np.searchsorted(np.cumsum(counts), rows, side="left")) + 1
