"""The losses of a long metrics.jsonl, read in a fraction of the time that all its metrics take, to be drawn while the rest is being read.

The file is cut at the name of the metric, and only what follows it is parsed. Every loss is read, so a thinned curve keeps its spikes.
Where the text is not what the recorder writes, the answer is None, and the file has to be read record by record.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

_NAME = b'"train/loss": '
_STEP = b'"step": '
_BLOCK_BYTES = 1 << 20
"""Read at once: small enough that other threads answer in between."""
_STEP_BYTES = 40
"""In front of a loss, `"step": 123, ` among them."""


@dataclass
class FoundLosses:
    """Losses in the order of the file; null, which stands for a number that was not finite, is nan."""

    values: list[float] = field(default_factory=list)
    before: list[bytes] = field(default_factory=list)
    """What stands in front of each loss."""

    def step(self, number: int) -> float:
        """The step of one loss. Raises ValueError if it does not stand in front of the loss, where the recorder writes it."""
        text = self.before[number].rpartition(_STEP)[2]
        return float(text.removesuffix(b", "))


def read_losses(path: Path) -> FoundLosses | None:
    """The losses of all whole lines; None if the file is missing or does not look like the recorder's. A torn last line is left out."""
    found, torn = FoundLosses(), b""
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                whole, newline, rest = block.rpartition(b"\n")
                if newline:
                    _add(found, torn + whole)
                    torn = rest
                else:
                    torn += block
    except (OSError, ValueError):
        return None
    return found if found.values else None


def _add(found: FoundLosses, lines: bytes) -> None:
    """Add the losses of whole lines. Raises ValueError for a loss that is neither a number nor null."""
    pieces = lines.split(_NAME)
    before, after = pieces[:-1], pieces[1:]
    numbers = json.loads(b"[%s]" % b",".join([piece[: piece.find(b",")] for piece in after]))
    if None in numbers:
        numbers = [math.nan if number is None else number for number in numbers]
    if len(numbers) != len(after) or not set(map(type, numbers)) <= {float, int}:
        raise ValueError("this is no line of metrics")
    found.values += numbers
    found.before += [piece[-_STEP_BYTES:] for piece in before]
