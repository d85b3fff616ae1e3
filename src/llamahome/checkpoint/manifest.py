"""MANIFEST.json: every file of a checkpoint with its size and SHA-256, so that any damage is found and named.

The manifest also contains the hash of its own content and must be exactly the text that `render` writes, so a flipped bit anywhere in a
checkpoint is detected. Files that it does not list are ignored.
Cost: one read of every file, several files at a time: about 0.9 s of processor time for a gigabyte on CPUs with instructions for SHA-256, a
fifth of it for reading through a buffer (a mapped file would save it, and end the process where the file gets shorter meanwhile).
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from llamahome import durable
from llamahome.distributed.processors import usable_cpus
from llamahome.errors import CheckpointError, Problem

NAME = "MANIFEST.json"
SCHEMA = 1
_KIND = "llamahome checkpoint"
_NAME = re.compile(r"checkpoint-(\d+)")
_MOST_READERS = 8
"""Files that are read at a time; more would wait for the disk."""
_Map = Callable[[Callable[[str], Problem | None], Iterable[str]], Iterable[Problem | None]]
_PACKAGES = ("llamahome", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Fingerprints:
    """SHA-256 of the training data and of the base model, in hex."""

    data: str
    base: str


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint contains and what wrote it."""

    run_id: str
    step: int
    fingerprints: Fingerprints
    versions: dict[str, str]
    files: dict[str, FileRecord]
    """Path relative to the checkpoint, with forward slashes -> size and hash."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(record.size for record in self.files.values())


@functools.cache
def versions_here() -> dict[str, str]:
    """The versions of Python and of the packages that shape a checkpoint; "absent" if a package is not installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def flush_file(folder: Path, path: Path) -> tuple[str, FileRecord]:
    """Flush a file below `folder` to the disk; returns its name in the manifest and its record."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        durable.flush_open(file, path)
        size = os.fstat(file.fileno()).st_size
    return path.relative_to(folder).as_posix(), FileRecord(size, digest)


def seal(
    folder: Path, *, run_id: str, step: int, fingerprints: Fingerprints, known: Mapping[str, FileRecord] = MappingProxyType({})
) -> Manifest:
    """Flush and hash every file and folder below `folder`, then write the manifest; after that, renaming `folder` commits the checkpoint.

    `known` are the records of files that other processes have flushed. Raises OSError.
    """
    files = dict(known)
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in sorted(names)):
            if path.relative_to(folder).as_posix() not in known:
                files.update([flush_file(folder, path)])
        durable.flush_folder(Path(parent))
    manifest = Manifest(run_id, step, fingerprints, dict(versions_here()), dict(sorted(files.items())))
    durable.write(folder / NAME, render(manifest))
    durable.flush_folder(folder)
    return manifest


def hand_over(folder: Path, old: str, new: str) -> None:
    """Name the run `new` in the manifest of `folder` if it names `old`; what is damaged or of another run stays. Raises OSError."""
    with suppress(CheckpointError):
        manifest = read(folder)
        if manifest.run_id == old and not folder.is_symlink():
            durable.write_whole(folder / NAME, render(replace(manifest, run_id=new)))


def render(manifest: Manifest) -> bytes:
    """The text of MANIFEST.json; the same manifest always gives the same bytes."""
    content: dict[str, Any] = {"kind": _KIND, "schema": SCHEMA, **asdict(manifest)}
    plain = json.dumps(content, sort_keys=True, allow_nan=False)
    content["sha256_of_this"] = hashlib.sha256(plain.encode()).hexdigest()
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read(folder: Path) -> Manifest:
    """Read the manifest of `folder` and check it against its own hash, but not against the files.

    Raises CheckpointError: checkpoint.not-a-checkpoint (no manifest), checkpoint.newer-schema, checkpoint.damaged.
    """
    path = folder / NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            Problem(code="checkpoint.not-a-checkpoint", message=f"the folder has no {NAME}, so it is not a checkpoint", where=str(folder))
        ) from error
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _damaged(path, "is not valid JSON") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise _damaged(path, "was not written by llamahome, or is damaged")
    if isinstance(content.get("schema"), int) and content["schema"] > SCHEMA and _hash_matches(content):
        raise CheckpointError(
            Problem(
                code="checkpoint.newer-schema",
                message=f"written by a newer llamahome (layout {content['schema']}; this one reads up to {SCHEMA})",
                where=str(path),
                hint="pip install --upgrade llamahome",
            )
        )
    try:
        manifest = _from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "is damaged: a field is missing or has a wrong type") from error
    if render(manifest) != text:
        raise _damaged(path, "is damaged: its content does not match its own checksum")
    return manifest


def verify(folder: Path) -> list[Problem]:
    """Compare the checkpoint in `folder` with its manifest. The list is empty if every byte is unchanged."""
    with ThreadPoolExecutor(min(_MOST_READERS, usable_cpus()), thread_name_prefix="llamahome-verify") as readers:
        return _compare(folder, _wrong_content, readers.map)


def compare_sizes(folder: Path) -> list[Problem]:
    """Compare the sizes of the files in `folder` with its manifest, without reading them."""
    return _compare(folder, _wrong_size, map)


def _compare(folder: Path, wrong: Callable[[Path, FileRecord], str | None], over_files: _Map) -> list[Problem]:
    """The problems of a manifest, or those of the files that it lists; `wrong` says what is wrong with a file."""
    inside = folder.resolve()
    try:
        manifest = read(folder)
    except CheckpointError as error:
        return list(error.problems)
    problems = [Problem(code="checkpoint.damaged", message=what, where=str(folder)) for what in _wrong_name(folder, manifest)]

    def check(name: str) -> Problem | None:
        path = folder / name
        try:
            what = (
                wrong(path, manifest.files[name])
                if path.resolve().is_relative_to(inside)
                else "is a link to a file outside of the checkpoint"
            )
        except FileNotFoundError:
            what = "is missing"
        except OSError as error:
            what = f"cannot be read: {error.strerror}"
        return _problem(path, what) if what is not None else None

    return [*problems, *(problem for problem in over_files(check, manifest.files) if problem is not None)]


def _wrong_name(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong if the folder's name has another step than the manifest, because it would be taken for a newer checkpoint."""
    named = _NAME.fullmatch(folder.name)
    if named is None or int(named[1]) == manifest.step:
        return []
    return [f"this checkpoint was saved at step {manifest.step:,}: it is a copy under another name"]


def _wrong_size(path: Path, record: FileRecord) -> str | None:
    size = path.stat().st_size
    return f"has {size:,} bytes instead of {record.size:,}" if size != record.size else None


def _wrong_content(path: Path, record: FileRecord) -> str | None:
    if (what := _wrong_size(path, record)) is not None:
        return what
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "has changed since it was written (its SHA-256 differs)" if digest != record.sha256 else None


def _problem(path: Path, what: str) -> Problem:
    return Problem(code="checkpoint.damaged", message=f"the file {what}", where=str(path))


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(_problem(path, what))


def _hash_matches(content: dict[str, Any]) -> bool:
    rest = {key: value for key, value in content.items() if key != "sha256_of_this"}
    return content.get("sha256_of_this") == hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _from_json(content: dict[str, Any]) -> Manifest:
    files = {name: FileRecord(int(record["size"]), str(record["sha256"])) for name, record in content["files"].items()}
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(name)
    return Manifest(
        run_id=str(content["run_id"]),
        step=int(content["step"]),
        fingerprints=Fingerprints(data=str(content["fingerprints"]["data"]), base=str(content["fingerprints"]["base"])),
        versions={str(name): str(version) for name, version in content["versions"].items()},
        files=files,
    )
