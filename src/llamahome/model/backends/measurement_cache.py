"""A cache of measurements in the user's cache folder, so that later runs on the same machine make the same choices without measuring again.

A file holds a JSON object with a list of positive numbers for each key. A file that is damaged or belongs to another user is replaced. If
no file can be written, the measurements hold for this run only.
"""

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llamahome.progress_marks import FLUSHING, marks

Numbers = tuple[float, ...]


def cached_measurements(
    path: Path,
    keys: Sequence[str],
    measure: Callable[[str], Numbers],
    *,
    count: int,
    is_conclusive: Callable[[Numbers], bool] = lambda numbers: True,
) -> dict[str, Numbers]:
    """The `count` numbers of each key, from the file or from `measure`; new ones are stored if they are conclusive.

    Processes of one machine take turns, so the first one measures for all.
    """
    with _lock(path):
        cached = _read(path, count)
        results = {key: cached[key] if key in cached else measure(key) for key in dict.fromkeys(keys)}
        new = {key: numbers for key, numbers in results.items() if key not in cached and is_conclusive(numbers)}
        if new:
            _write(path, {**cached, **new})
    return results


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Exclude other processes of this user; without effect if no lock file can be created."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = stack.enter_context(path.with_suffix(".lock").open("w"))
            with marks.allowing(FLUSHING):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path, count: int) -> dict[str, Numbers]:
    """The content of the file; empty if it is missing, damaged or another user's."""
    try:
        if path.stat().st_uid != os.getuid():
            return {}
        content = {key: tuple(map(float, numbers)) for key, numbers in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    valid = all(len(numbers) == count and all(math.isfinite(x) and x > 0 for x in numbers) for numbers in content.values())
    return content if valid else {}


def _write(path: Path, content: dict[str, Numbers]) -> None:
    """Replace the file atomically."""
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        Path(file.name).replace(path)
