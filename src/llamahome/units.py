"""Quantities that carry their unit: "200 steps", "3 epochs", "10 min", "4 GiB"; and how numbers are shown to people."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

IntervalUnit = Literal["steps", "epochs", "seconds"]

_SECONDS = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MOST_PROFILED_STEPS = 50
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True)
class Interval:
    """How often something is due: every so many steps, epochs or seconds."""

    value: float
    unit: IntervalUnit

    def __str__(self) -> str:
        if self.unit == "seconds":
            for word, size in (("h", 3600.0), ("min", 60.0)):
                if self.value >= size and self.value % size == 0:
                    return f"{self.value / size:g} {word}"
            return f"{self.value:g} s"
        return f"{self.value:g} {self.unit if self.value != 1 else self.unit[:-1]}"


def parse_interval(text: str) -> Interval:
    """Read "200 steps", "1 epoch", "10 min", "2 s" or "1 h"; ValueError says what is allowed."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit, like '500 steps', '1 epoch' or '10 min'")
    value, word = float(match[1]), match[2]
    if value <= 0:
        raise ValueError(f"{text!r} must be more than zero")
    singular = word[:-1] if word.endswith("s") and len(word) > 1 else word
    if singular in ("step", "epoch"):
        if singular == "step" and value != int(value):
            raise ValueError(f"{text!r} is not a whole number of steps")
        return Interval(value, "steps" if singular == "step" else "epochs")
    if singular in _SECONDS:
        return Interval(value * _SECONDS[singular], "seconds")
    raise ValueError(f"{text!r} has an unknown unit {word!r}; use steps, epochs, s, min or h")


def parse_rows(text: str) -> int:
    """Read "1000 rows"; ValueError says what is allowed."""
    match = _QUANTITY.fullmatch(text.replace(",", "").replace("_", ""))
    if match is None or match[2] not in ("row", "rows") or float(match[1]) != int(float(match[1])):
        raise ValueError(f"{text!r} is not a number of rows like '1000 rows'")
    return int(float(match[1]))


def parse_steps(text: str) -> tuple[int, int]:
    """Read "steps 20-25" or "step 20" into the first and the last step; ValueError says what is allowed."""
    match = re.fullmatch(r"\s*steps?\s+([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a range of steps like 'steps 20-25'")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise ValueError(f"{text!r} is not a range of steps: they count from 1, and the first comes first")
    if last - first >= MOST_PROFILED_STEPS:
        raise ValueError(f"{text!r} are more than {MOST_PROFILED_STEPS} steps, whose trace would be too large to look at")
    return first, last


def parse_nodes(text: str) -> tuple[int, int]:
    """Read "1:2" into the least and the most machines; ValueError says what is allowed."""
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r} is neither a number of machines nor the least and the most like '1:2'")
    return int(match[1]), int(match[2])


def parse_bytes(text: str) -> int:
    """Read "4 GiB" or "500 MB" into bytes; ValueError says what is allowed."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in _BYTES:
        raise ValueError(f"{text!r} is not a size like '4 GiB' or '500 MB'")
    return int(float(match[1]) * _BYTES[match[2]])


def show_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_seconds(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    rounded = max(0, int(seconds + 0.5))
    hours, rest = divmod(rounded, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def show_count(count: float) -> str:
    """12345 -> "12,345"; 1234567 -> "1.23M"."""
    if abs(count) >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.2f}M" if abs(count) >= 1e6 else f"{count:,.0f}"


def show_time(unix_seconds: float) -> str:
    """`2026-11-22 07:14`, by the clock of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_seconds))


def many(count: int, word: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text, every column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
