"""What was measured on this machine, kept in the user's cache folder, so that later starts decide alike without measuring again.

A file is JSON, a list of positive numbers for each key. One that is damaged or another user's is made anew; where none can be written
what was measured holds for this run alone.
"""

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Numbers = tuple[float, ...]


def measured(
    path: Path, keys: Sequence[str], measure: Callable[[str], Numbers], *, count: int, keeps: Callable[[Numbers], bool] = lambda found: True
) -> dict[str, Numbers]:
    """The `count` numbers of each key: from the file, or from `measure` and then kept if `keeps` says so.

    Processes of one machine measure one after the other; the first decides for all.
    """
    with _alone(path):
        known = _read(path, count)
        found = {key: known[key] if key in known else measure(key) for key in dict.fromkeys(keys)}
        new = {key: numbers for key, numbers in found.items() if key not in known and keeps(numbers)}
        if new:
            _write(path, {**known, **new})
    return found


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this user at a time; where no lock can be made each measures for itself."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path, count: int) -> dict[str, Numbers]:
    try:
        if path.stat().st_uid != os.getuid():
            return {}
        known = {key: tuple(map(float, numbers)) for key, numbers in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    sound = all(len(numbers) == count and all(math.isfinite(each) and each > 0 for each in numbers) for numbers in known.values())
    return known if sound else {}


def _write(path: Path, known: dict[str, Numbers]) -> None:
    """Whole or not at all."""
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
            json.dump(known, file, indent=1)
        Path(file.name).replace(path)
