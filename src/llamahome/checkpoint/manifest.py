"""MANIFEST.json: every file of a checkpoint with its size and SHA-256, so that damage of any kind is found and named.

The manifest also vouches for itself: it holds the hash of its own content and must be written exactly as `render` writes it,
so one flipped bit anywhere in a checkpoint shows. Files that it does not list are none of its business.
Cost: one read of every file (SHA-256 runs near memory speed where the processor has instructions for it).
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from llamahome.errors import CheckpointError, Problem

NAME = "MANIFEST.json"
SCHEMA = 1
_KIND = "llamahome checkpoint"
_PACKAGES = ("llamahome", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Fingerprints:
    """What the training learns from and starts from, as SHA-256 in hex."""

    data: str
    base: str


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and what made it."""

    run_id: str
    step: int
    fingerprints: Fingerprints
    versions: dict[str, str]
    files: dict[str, FileRecord]
    """By path relative to the checkpoint, with forward slashes."""

    @property
    def total_bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(record.size for record in self.files.values())


@functools.cache
def versions_here() -> dict[str, str]:
    """The versions that shape a checkpoint; a package that is not installed is "absent"."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def flushed(folder: Path, path: Path) -> tuple[str, FileRecord]:
    """Flush a file below `folder` to the disk; its name in the manifest and what stands there of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return path.relative_to(folder).as_posix(), FileRecord(size, digest)


def seal(
    folder: Path, *, run_id: str, step: int, fingerprints: Fingerprints, known: Mapping[str, FileRecord] = MappingProxyType({})
) -> Manifest:
    """Flush every file and folder below `folder` to the disk, hash them on the way, and write the manifest last.

    `known` are the files that other processes have flushed. After it returns one rename of `folder` makes the checkpoint. Raises OSError.
    """
    files = dict(known)
    for place, _, names in os.walk(folder, topdown=False):
        for path in (Path(place, name) for name in sorted(names)):
            if path.relative_to(folder).as_posix() not in known:
                files.update([flushed(folder, path)])
        flush_folder(Path(place))
    manifest = Manifest(run_id, step, fingerprints, dict(versions_here()), dict(sorted(files.items())))
    with (folder / NAME).open("wb") as file:
        file.write(render(manifest))
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)
    return manifest


def flush_files(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with Path(place, name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(place))


def flush_folder(folder: Path) -> None:
    """Make the names inside `folder` durable: after a rename or a new file, on POSIX."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def render(manifest: Manifest) -> bytes:
    """The only text that stands for `manifest`."""
    content: dict[str, Any] = {"kind": _KIND, "schema": SCHEMA, **asdict(manifest)}
    plain = json.dumps(content, sort_keys=True, allow_nan=False)
    content["sha256_of_this"] = hashlib.sha256(plain.encode()).hexdigest()
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read(folder: Path) -> Manifest:
    """The manifest of `folder`, checked against itself but not against the files.

    Raises CheckpointError: checkpoint.not-a-checkpoint (no manifest), checkpoint.newer-schema, checkpoint.damaged.
    """
    path = folder / NAME
    try:
        written = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            Problem(code="checkpoint.not-a-checkpoint", message=f"the folder has no {NAME}, so it is no checkpoint", where=str(folder))
        ) from error
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error
    try:
        content = json.loads(written)
    except ValueError as error:
        raise _damaged(path, "is not valid JSON") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise _damaged(path, "was not written by llamahome, or is damaged")
    if isinstance(content.get("schema"), int) and content["schema"] > SCHEMA and _hash_holds(content):
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
        raise _damaged(path, "is damaged: not all of its fields are there") from error
    if render(manifest) != written:
        raise _damaged(path, "is damaged: its content does not match its own checksum")
    return manifest


def verify(folder: Path) -> list[Problem]:
    """Everything that is wrong with the checkpoint in `folder`; empty when every byte is as it was written."""
    try:
        manifest = read(folder)
    except CheckpointError as error:
        return list(error.problems)
    problems = []
    for name, record in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != record.size:
                problems.append(_problem(path, f"has {size:,} bytes instead of {record.size:,}"))
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            problems.append(_problem(path, "is missing"))
        except OSError as error:
            problems.append(_problem(path, f"cannot be read: {error.strerror}"))
        else:
            if digest != record.sha256:
                problems.append(_problem(path, "has changed since it was written (its SHA-256 differs)"))
    return problems


def with_last_hint(problems: list[Problem], hint: str) -> list[Problem]:
    """The same problems, the last of them naming what mends them all."""
    return [*problems[:-1], replace(problems[-1], hint=hint)]


def _problem(path: Path, what: str) -> Problem:
    return Problem(code="checkpoint.damaged", message=f"the file {what}", where=str(path))


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(_problem(path, what))


def _hash_holds(content: dict[str, Any]) -> bool:
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
