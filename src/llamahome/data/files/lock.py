"""Waits for a lock on a file or folder that another process holds, as long as that process makes progress."""

import fcntl
import time
from collections.abc import Callable

from llamahome.progress_marks import PATIENT, marks

_POLL_S = 0.1


def wait_for_lock(descriptor: int, progress: Callable[[], object]) -> None:
    """Lock the open file `descriptor`. What `progress` returns changes while the holder works; each change is a mark. Raises OSError."""
    seen = progress()
    with marks.allowing(PATIENT):
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL_S)
                if seen != (seen := progress()):
                    marks.advance()
            else:
                return
