"""Sets up the standard library's logging: messages of libraries go to the log file of the run, not to the screen.

The screen belongs to monitoring/progress.py and the error blocks of cli/. `--debug` also writes the log to stderr.
"""

import logging
import sys
from pathlib import Path

from llamahome.redaction import redact

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Formatter(logging.Formatter):
    """Without secrets, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to_stderr(*, debug: bool) -> None:
    """Set up the root logger: with `debug` everything from INFO on goes to stderr, otherwise only errors."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(_FORMAT))
    handler.setLevel(logging.INFO if debug else logging.ERROR)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def log_to_file(path: Path) -> logging.Handler:
    """Also write every message from INFO on to `path`, whose folder is made; the caller closes the handler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Formatter(_FORMAT))
    handler.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    return handler
