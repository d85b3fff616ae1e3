"""A file that a browser sends, written to data/training/uploads while it comes, under a name that cannot leave this folder.

Nothing is overwritten: a second file of the same name gets a number. A file that does not come whole leaves nothing behind.
"""

import asyncio
import itertools
import re
import secrets
import shutil
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import ClientDisconnect

from llamahome.data.files.kinds import ENDINGS, is_read
from llamahome.rundir import UPLOADS

MOST_BYTES = 2 << 30
"""Larger files are on this machine already, or are copied to it by other means; their path is typed."""
_LONGEST_NAME = 100
_SPARE = 1 << 30
"""Bytes of the disk that stay free for a checkpoint."""
_SECONDS_BETWEEN_PARTS = 60


class RefusedUpload(Exception):
    """Why a file is not taken."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def safe_name(given: str) -> str:
    """The name under which a file is written. Raises RefusedUpload if it is a path, hidden, or no file of rows."""
    name = unicodedata.normalize("NFC", given)
    if not name or len(name) > _LONGEST_NAME or not name.isprintable() or re.search(r"[/\\:]", name) or name.startswith("."):
        raise RefusedUpload(400, "this is not the plain name of a file")
    safe = re.sub(r"-*\.", ".", re.sub(r"[^\w.-]+", "-", name)).lstrip("-.")
    if not Path(safe).suffix or not is_read(safe):
        raise RefusedUpload(415, f"files of rows end with {', '.join(ENDINGS)}, also followed by .gz or .zst")
    return safe


async def receive(given: str, size: int, parts: AsyncIterator[bytes], folder: Path = UPLOADS) -> Path:
    """Write the `size` bytes that come in `parts`; the new file. Raises RefusedUpload."""
    name = safe_name(given)
    if size > MOST_BYTES:
        raise RefusedUpload(413, f"the file is larger than {MOST_BYTES >> 30} GiB; type its path instead")
    if size < 1:
        raise RefusedUpload(400, "the file is empty")
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < size + _SPARE:
        raise RefusedUpload(507, "the disk has not enough room for this file")
    partial = folder / f".{secrets.token_hex(8)}.part"
    try:
        with partial.open("xb") as file:
            written = 0
            while (part := await _next(parts)) is not None:
                written += len(part)
                if written > size:
                    raise RefusedUpload(400, "more bytes came than were announced")
                await asyncio.to_thread(file.write, part)
        if written != size:
            raise RefusedUpload(400, "the file did not come whole")
        return _named(partial, folder / name)
    finally:
        partial.unlink(missing_ok=True)


async def _next(parts: AsyncIterator[bytes]) -> bytes | None:
    try:
        return await asyncio.wait_for(anext(parts), _SECONDS_BETWEEN_PARTS)
    except StopAsyncIteration:
        return None
    except (TimeoutError, ClientDisconnect) as error:
        raise RefusedUpload(408, "the file did not come whole") from error


def _named(partial: Path, wanted: Path) -> Path:
    """Give the file its name, or the first one with a number that is free; a name is claimed before the file takes it."""
    stem, dot, endings = wanted.name.partition(".")
    names = (f"{stem}{f'-{number}' if number > 1 else ''}{dot}{endings}" for number in itertools.count(1))
    for name in names:
        place = wanted.with_name(name)
        try:
            place.open("xb").close()
        except FileExistsError:
            continue
        return partial.replace(place)
    raise AssertionError("unreachable: itertools.count never ends")
