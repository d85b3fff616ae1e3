"""Values of files that anybody may have damaged, as numbers, counts and times that can be computed with and shown. No torch.

JSON of Python knows NaN, infinity and whole numbers of any length; a reader that divides by one or asks for its date would fail, and one
damaged file would hide every run. A value that is out of range counts as one that is missing.
"""

import time

_LARGEST = 1e300
"""Nothing that is measured is larger, and sums and scales of such values stay finite."""
_MOST = 2**53
"""Whole numbers that a float holds exactly."""
_LAST_MOMENT = 253_402_214_400.0
"""Unix seconds at the end of the year 9999, less a day for time zones."""


def number(value: object) -> float | None:
    """A finite number as it is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -_LARGEST <= value <= _LARGEST else None


def whole(value: object) -> int | None:
    """A count: a whole number of at least 0; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST else None


def moment(value: object) -> float | None:
    """Unix seconds that have a date; None for anything else."""
    seconds = number(value)
    return seconds if seconds is not None and 0 <= seconds <= _LAST_MOMENT else None


def show_moment(value: object, form: str = "%Y-%m-%d %H:%M") -> str:
    """The date and time of Unix seconds on this machine; empty if they have none."""
    seconds = moment(value)
    return "" if seconds is None else time.strftime(form, time.localtime(seconds))
