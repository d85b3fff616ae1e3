"""One set-up of the standard library's logging: what goes wrong inside libraries goes to the run's log file, not the screen.

The screen belongs to monitoring/progress.py and the error blocks of cli/. `--debug` also writes the log to stderr.
"""

import logging
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr(*, debug: bool) -> None:
    """Set up the root logger: with `debug` everything from INFO on goes to stderr, otherwise errors of libraries only."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.setLevel(logging.INFO if debug else logging.ERROR)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def log_to_file(path: Path) -> logging.Handler:
    """Add `path` (its folder is made) as a target of every message from INFO on; the caller closes the handler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    return handler
