"""The forms of drafts in data/metrics/drafts/, so that a draft outlives the server: one file each, which only its owner can read.

A form may hold what is secret to others, such as a token among its settings. Drafts that were started, are a month old, or have twenty
newer ones beside them are removed. A folder that cannot be written costs nothing but the memory of the next server.
"""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from llamahome import durable
from llamahome.dashboard.commands import Form

_NAME = re.compile(r"[A-Za-z0-9_-]{8,40}")
_MOST_BYTES = 64 << 10
_OLD_S = 30 * 24 * 3600.0


class DraftFiles:
    """The kept forms by the names of their drafts."""

    def __init__(self, folder: Path, *, most: int) -> None:
        self._folder, self._most = folder, most

    def read(self, name: str) -> Form | None:
        """The form of this draft; None if there is none, it is too old or its file is damaged."""
        path = self._path(name)
        try:
            if path is None or path.stat().st_size > _MOST_BYTES or time.time() - path.stat().st_mtime > _OLD_S:
                return None
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        known = {field.name for field in fields(Form)}
        if not isinstance(found, dict) or found.keys() != known or not all(isinstance(value, str) for value in found.values()):
            return None
        return Form(**found)

    def write(self, name: str, form: Form) -> None:
        """Keep the form, and remove drafts that are old."""
        path = self._path(name)
        if path is None:
            return
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.chmod(0o700)
            with durable.replacing(path) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(json.dumps(asdict(form), ensure_ascii=False).encode())
            self._remove_old()

    def remove(self, name: str) -> None:
        """Forget the form of this draft."""
        if (path := self._path(name)) is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        return self._folder / f"{name}.json" if _NAME.fullmatch(name) else None  # a name comes from an address

    def _remove_old(self) -> None:
        durable.remove_remains(self._folder, ".*.tmp")
        newest = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for number, path in enumerate(newest):
            if number >= self._most or time.time() - path.stat().st_mtime > _OLD_S:
                path.unlink(missing_ok=True)
