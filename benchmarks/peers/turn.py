"""A training that waits for its turn: JSON lines from stdin to stdout, and a hash of what was really fed to the model.

    ready                              after the model is loaded, before the first step
    {"go": 2}   -> {"seconds": ...}    does the next two steps and tells what they took and held
    {"quit": 1}                        ends the process at once, as does the end of stdin

A process that waits is blocked in a read and burns nothing. What the trainer itself prints goes to stderr. Only Python's own library is
needed here, and torch where it is loaded anyway.
"""

import hashlib
import json
import os
import resource
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

IGNORED = -100
"""The label of a token that is not learned, as all peers have it."""


def row_digest(ids: Sequence[int], learned: Sequence[bool]) -> bytes:
    """SHA-256 over the token ids (int32) and which of them are targets, before any shift."""
    return hashlib.sha256(array("i", ids).tobytes() + bytes(map(bool, learned))).digest()


class Fed:
    """What a trainer was fed, step by step. Rows of one step count in any order; steps do not."""

    def __init__(self) -> None:
        self._chain = hashlib.sha256()
        self._rows: list[bytes] = []
        self._tokens = self._targets = self._squares = 0

    def row(self, ids: Sequence[int], learned: Sequence[bool]) -> None:
        """One row of the step that runs."""
        self._rows.append(row_digest(ids, learned))
        self._tokens += len(ids)
        self._targets += sum(map(bool, learned))
        self._squares += len(ids) ** 2

    def end_step(self) -> dict[str, int]:
        """Close the step; its rows, tokens, targets and the sum of squared lengths."""
        self._chain.update(b"".join(sorted(self._rows)) + b"|")
        told = {"rows": len(self._rows), "tokens": self._tokens, "targets": self._targets, "squares": self._squares}
        self._rows, self._tokens, self._targets, self._squares = [], 0, 0, 0
        return told

    @property
    def digest(self) -> str:
        """Over all closed steps."""
        return self._chain.hexdigest()[:16]


def peak_memory() -> int:
    """Most bytes that this process ever held in memory, without what its parent held before it was started."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Turn:
    """The trainer calls `between` before each step, the first too; it returns when the next step may begin."""

    def __init__(self) -> None:
        self.fed = Fed()
        self._commands: dict[str, Callable[[], dict[str, Any]]] = {}
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._granted = -1
        self._steps: list[dict[str, Any]] = []
        self._begin = 0.0

    def command(self, name: str, does: Callable[[], dict[str, Any]]) -> None:
        """Let the other side ask for something else between two turns."""
        self._commands[name] = does

    def between(self, loss: float | None = None) -> None:
        """A step ended with this mean loss per target, or None has begun yet; wait for the next turn when all granted ones are done."""
        if self._granted < 0:
            self._tell({"ready": True})
            self._wait()
            return
        self._steps.append({**self.fed.end_step(), "loss": loss})
        if len(self._steps) >= self._granted:
            seconds = time.perf_counter() - self._begin
            self._tell({"seconds": seconds, "steps": self._steps, "hash": self.fed.digest, "peak": peak_memory()})
            self._wait()

    def _wait(self) -> None:
        for line in iter(sys.stdin.readline, ""):
            asked = json.loads(line)
            if "go" in asked:
                self._granted, self._steps, self._begin = int(asked["go"]), [], time.perf_counter()
                return
            name = next(iter(asked))
            if name not in self._commands:
                break
            self._tell(self._commands[name]())
        leave()

    def _tell(self, value: Mapping[str, Any]) -> None:
        print(json.dumps(value), file=self._out, flush=True)


def leave() -> NoReturn:
    """End now: nothing that a trainer does at its end is measured here."""
    sys.stderr.flush()
    os._exit(0)


def task() -> dict[str, Any]:
    """What this process is to do, from the file that its only argument names."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def read_rows(path: str) -> list[dict[str, list[int]]]:
    """Rows with `input_ids` and `labels`, in the order of training."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
