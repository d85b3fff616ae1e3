"""The losses of a long metrics.jsonl, read in a fraction of the time that all its metrics take, to be drawn while the rest is being read.

Only the step and the loss are looked for, where the recorder writes them. Every loss is compared, so the thinned curve keeps its spikes,
but only those that are drawn are parsed: as long as all have one digit before the point, their texts are in the order of their values.
Where there are no losses, the answer is None, and the file has to be read record by record.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from llamahome.monitoring.series import extremes

_LOSS = re.compile(rb'"step": (\d+), "train/loss": ([^,]+),')
_BLOCK_BYTES = 1 << 18
"""Read at once: it stays in the processor's cache, and other threads answer in between."""


def read_losses(path: Path, points: int, *, block_bytes: int = _BLOCK_BYTES) -> tuple[list[float], list[float | None]] | None:
    """Steps and losses of all whole lines, thinned as `thin` does it; a null, which stands for a number that was not finite, is None.

    None if there is no loss, or one that is no number. A torn last line is left out.
    """
    steps: list[bytes] = []
    losses: list[bytes] = []
    torn = b""
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(block_bytes):
                end = block.rfind(b"\n") + 1
                pairs = _LOSS.findall(torn + block[:end]) if end else []
                torn = block[end:] if end else torn + block
                steps += [step for step, _ in pairs]
                losses += [loss for _, loss in pairs]
        kept = extremes(losses if _in_order(losses) else _numbers(losses), points)
        return ([float(steps[at]) for at in kept], _numbers([losses[at] for at in kept])) if losses else None
    except (OSError, ValueError):
        return None


def _in_order(losses: Sequence[bytes]) -> bool:
    """Whether all are like 2.4171, so that the greater number is the greater text."""
    whole = b",".join(losses)
    return not any(sign in whole for sign in (b"e", b"E", b"n", b"N", b"-")) and {loss[1:2] for loss in losses} == {b"."}


def _numbers(texts: Sequence[bytes]) -> list[float | None]:
    """The values of some losses, None for those that were not finite. Raises ValueError for what is no number."""
    numbers = json.loads(b"[%s]" % b",".join(texts))  # in the time of float() for each, and it knows null
    if not set(map(type, numbers)) <= {float, int, type(None)}:
        raise ValueError("a loss is a number or null")
    return [number if number is not None and math.isfinite(number) else None for number in numbers]
