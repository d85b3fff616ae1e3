"""A teacher's likeliest tokens at every target of some rows, on disk: `data teach` writes them, and distillation reads them.

An example is found by a hash of its tokens and targets, because what the teacher says depends on nothing else. So rows may be left out,
mixed, held out or put in another order without asking the teacher again; an example that it never read is refused. teacher.json is written
last: a folder without it is unfinished, and `data teach` goes on after its last whole part. Size: 8 bytes per target and token kept.
Memory: 16 bytes per example; values are read from the files when they are needed.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from llamahome import durable
from llamahome.data.records import Example
from llamahome.data.store.table import ExampleTable, running_sums
from llamahome.errors import DataError, Problem

ABOUT = "teacher.json"
PART_TARGETS = 65_536
"""Targets of a part, which is held in memory while it is made: 17 MB with 32 tokens each."""
_VERSION = 1


@dataclass(frozen=True)
class TaughtValues:
    """The likeliest tokens of N targets, [N, K] with the likeliest first, their log-probabilities, and that of all others together [N]."""

    ids: NDArray[np.int32]
    logs: NDArray[np.float32]
    rest: NDArray[np.float32]


@dataclass(frozen=True)
class About:
    """What teacher.json says."""

    stamp: str
    """Hash of teacher, tokenizer, rows and top_k: what a part must have in common with the others."""
    teacher: str
    """Its name as it was typed."""
    teacher_fingerprint: str
    tokenizer: str
    """Fingerprint of the tokenizer that made the tokens."""
    top_k: int
    data: tuple[str, ...]
    data_fingerprint: str
    examples: int
    targets: int
    parts: int
    version: int = _VERSION


def key_of(example: Example) -> int:
    """64 bits that tell an example by its tokens and targets."""
    digest = hashlib.blake2b(np.ascontiguousarray(example.tokens, "<i4").tobytes(), digest_size=8)
    digest.update(np.packbits(example.targets).tobytes())
    return int.from_bytes(digest.digest(), "little")


def parts_of(table: ExampleTable, part_targets: int = PART_TARGETS) -> list[range]:
    """The examples of each part: consecutive ones, as many as give `part_targets` targets or a little more."""
    per_example = np.add.reduceat(table.targets, table.offsets[:-1], dtype=np.int64) if len(table) else np.empty(0, np.int64)
    parts, begin, targets = [], 0, 0
    for number, count in enumerate(per_example.tolist()):
        targets += count
        if targets >= part_targets or number == len(per_example) - 1:
            parts.append(range(begin, number + 1))
            begin, targets = number + 1, 0
    return parts


def part_path(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"part-{number:05d}.safetensors"


def write_part(folder: Path, number: int, examples: Sequence[Example], values: TaughtValues, *, stamp: str) -> None:
    """Write a whole part; `values` has the targets of all examples, one after the other."""
    arrays = {
        "keys": np.array([key_of(example) for example in examples], np.uint64),
        "counts": np.array([int(example.targets.sum()) for example in examples], np.int64),
        **{name: np.ascontiguousarray(array) for name, array in vars(values).items()},
    }
    durable.write_whole(part_path(folder, number), safetensors.numpy.save(arrays, metadata={"stamp": stamp}))


def is_whole(folder: Path, number: int, *, stamp: str) -> bool:
    """Whether a part of this stamp is there."""
    try:
        with safetensors.safe_open(part_path(folder, number), framework="numpy") as file:
            return _stamp(file) == stamp
    except (OSError, safetensors.SafetensorError):
        return False


def _stamp(file: Any) -> str | None:
    stamp: str | None = (file.metadata() or {}).get("stamp")
    return stamp


def finish(folder: Path, about: About) -> None:
    """Write teacher.json, which makes the folder whole, and remove parts of an earlier try with more of them."""
    durable.write_whole(folder / ABOUT, json.dumps(asdict(about), indent=1) + "\n")
    for path in folder.glob("part-*.safetensors"):
        if path not in {part_path(folder, number) for number in range(about.parts)}:
            path.unlink()


def read_about(folder: Path) -> About | None:
    """What a whole folder says of itself; None if it is not whole."""
    try:
        values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return About(**{**values, "data": tuple(values["data"])}) if values["version"] == _VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Taught:
    """The values of a whole folder, by example. Several threads may read."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if the folder is not whole or a part is damaged."""
        about = read_about(folder)
        if about is None:
            there = (folder / ABOUT).exists()
            why = f"its {ABOUT} cannot be read" if there else f"it has no {ABOUT}, so `data teach` did not write it or did not end"
            raise DataError(_unusable(folder, why))
        self.about, self.folder = about, folder
        self._files = [self._open(number) for number in range(about.parts)]
        keys, counts = ([file.get_tensor(name) for file in self._files] for name in ("keys", "counts"))
        self._keys: NDArray[np.uint64] = np.concatenate([np.empty(0, np.uint64), *keys])
        parts = np.repeat(np.arange(len(keys)), [len(each) for each in keys])
        begins = np.concatenate([np.empty(0, np.int64), *(running_sums(each)[:-1] for each in counts)])
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._parts, self._begins = self._keys[order], parts[order], begins[order]

    def _open(self, number: int) -> Any:
        try:
            file = safetensors.safe_open(part_path(self.folder, number), framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(_unusable(self.folder, f"{part_path(self.folder, number).name} cannot be read: {error}")) from error
        if _stamp(file) != self.about.stamp:
            raise DataError(_unusable(self.folder, f"{part_path(self.folder, number).name} is not of this teacher and these rows"))
        return file

    def _place(self, example: Example) -> int | None:
        key = np.uint64(key_of(example))
        at = int(np.searchsorted(self._keys, key))
        return at if at < len(self._keys) and self._keys[at] == key else None

    def missing(self, examples: Iterator[Example]) -> Example | None:
        """The first example that the teacher has not read."""
        return next((example for example in examples if self._place(example) is None), None)

    def values(self, example: Example) -> TaughtValues:
        """At the targets of `example`. Raises DataError if the teacher has not read it."""
        place = self._place(example)
        if place is None:
            raise DataError(self.not_taught(example))
        file, begin = self._files[int(self._parts[place])], int(self._begins[place])
        end = begin + int(example.targets.sum())
        return TaughtValues(*(file.get_slice(name)[begin:end] for name in ("ids", "logs", "rest")))

    def not_taught(self, example: Example) -> Problem:
        """The problem that `example` was never read by the teacher."""
        message = "the teacher has not read this row as it is now: the row, data.max_length, the template or what is learned has changed"
        where = f"{example.source}:{example.line}" if example.source else None
        hint = f"llamahome data teach with the same data and settings, --teacher {self.about.teacher} and a new --output"
        return Problem(code="data.not-taught", message=message, where=where, hint=hint)


def holds_others(folder: Path) -> bool:
    """Whether something is there that `data teach` would refuse to write to: other files, or a teacher.json that cannot be read."""
    if not folder.is_dir():
        return folder.exists()
    return read_about(folder) is None and any(not path.name.startswith(("part-", ".")) for path in folder.iterdir())


def _unusable(folder: Path, why: str) -> Problem:
    output = f"{folder}-2" if holds_others(folder) else folder
    hint = f"llamahome data teach DATA --teacher MODEL --output {output}"
    return Problem(
        code="data.bad-teacher", message=f"this is no folder of a teacher's log-probabilities: {why}", where=str(folder), hint=hint
    )
