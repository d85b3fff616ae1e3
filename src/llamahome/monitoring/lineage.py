"""lineage.json: the adapter that a run began with, the one before it, and so on. It stays true when these are deleted."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from llamahome import durable
from llamahome.rundir import RunPaths, open_run, run_of

_SAMPLE = 1 << 20
"""Bytes."""


@dataclass(frozen=True)
class Ancestor:
    """An adapter that a later run began with."""

    path: str
    run: str | None
    """The id of the run that trained it; None for an adapter of another origin."""
    sha256: str
    """Of samples of its weights, as `_hash` takes them."""

    def describe(self) -> str:
        """`brisk-otter (output/runs/.../final)`, and that it is gone or was changed, if it was."""
        now = _hash(Path(self.path))
        change = "" if now == self.sha256 else ", gone" if now is None else ", changed since"
        return f"{self.run} ({self.path}{change})" if self.run else f"{self.path}{change}"


def write_lineage(paths: RunPaths, parent: Path) -> None:
    """Record the adapter in the folder `parent`, and what its run began with. Raises OSError."""
    run = run_of(parent)
    before = read_lineage(open_run(run)) if run is not None else []
    own = Ancestor(str(parent.resolve()), open_run(run).run_id if run is not None else None, _hash(parent) or "")
    durable.write_whole(paths.lineage, json.dumps([asdict(each) for each in (own, *before)], indent=2) + "\n")


def read_lineage(paths: RunPaths) -> list[Ancestor]:
    """What the run began with, the nearest first; empty if it began with no adapter, or the file cannot be read."""
    try:
        found = [Ancestor(**each) for each in json.loads(paths.lineage.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
    are_texts = all(isinstance(text, str) for each in found for text in (each.path, each.run or "", each.sha256))
    return found if are_texts and not any("\0" in each.path for each in found) else []


def _hash(folder: Path) -> str | None:
    """SHA-256 of name, size, first and last MiB of each weights file of an adapter or a model; None if there are none to read.

    Training changes every weight, so this much tells two states apart, and a model of 16 GB is not read for it.
    """
    digest = hashlib.sha256()
    try:
        files = sorted(folder.glob("*.safetensors"))
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    except OSError:
        return None
    return digest.hexdigest() if files else None
