"""At resume, takes back the records of steps that will be done again, so that each step is recorded once.

The order makes a kill at any point harmless: the records are first added to superseded.jsonl and flushed to disk, then the file
without them replaces the old one in a rename. Killed in between, the next resume does the same again; superseded.jsonl may
then hold a record twice, metrics.jsonl never. One pass over the file, constant memory.
"""

import json
import os
from pathlib import Path
from typing import IO

from llamahome.errors import MachineError, Problem
from llamahome.monitoring.sinks import json_line

_TRIMMED = ("metrics.jsonl", "samples.jsonl")


def supersede_after(folder: Path, step: int) -> int:
    """Move every record of a step after `step` to superseded.jsonl and return how many; a torn last line is dropped.

    MachineError when the folder cannot be written.
    """
    try:
        return sum(_trim(folder / name, step) for name in _TRIMMED if (folder / name).is_file())
    except OSError as error:
        raise MachineError(
            Problem(
                code="machine.metrics-not-writable",
                message=f"cannot trim the metrics to step {step}: {error.strerror or error}",
                where=str(error.filename or folder),
                hint=f"make room or give yourself the right to write in {folder}, then run the same command again",
            )
        ) from error


def _trim(path: Path, step: int) -> int:
    kept_path = path.with_name(f".{path.name}.kept")
    superseded_path = path.with_name("superseded.jsonl")
    with path.open("rb") as source, kept_path.open("wb") as kept, superseded_path.open("ab") as superseded:
        moved, torn = 0, False
        for line in source:
            if not line.endswith(b"\n"):
                torn = True
            elif _step_of(line) <= step:
                kept.write(line)
            else:
                superseded.write(_marked(line, path.name))
                moved += 1
        _to_disk(superseded)
        _to_disk(kept)
    if moved or torn:
        kept_path.replace(path)
        _flush_folder(path.parent)
    else:
        kept_path.unlink()
    if superseded_path.stat().st_size == 0:
        superseded_path.unlink()
    return moved


def _step_of(line: bytes) -> float:
    """The step of a record; a line without one stays where it is."""
    try:
        found = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return -1
    return found if isinstance(found, int | float) else -1


def _marked(line: bytes, name: str) -> bytes:
    return json_line({**json.loads(line), "file": name})


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
