"""Lets a trainer run a few steps at a time on request, over JSON lines, and hashes the rows that the model got.

    {"ready": true}                    is written after the model is loaded, before the first step
    {"go": 2}   -> {"seconds": ...}    runs the next two steps and writes their time, counts and losses
    {"quit": 1}                        ends the process at once, as does the end of stdin

A waiting process is blocked in a read and uses no CPU time. The trainer's own output goes to stderr. Needs only the standard library.
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
"""The label of a token that is not a target, in all peers."""


def row_digest(ids: Sequence[int], learned: Sequence[bool]) -> bytes:
    """SHA-256 of the token ids (int32) and of the target mask, before any shift."""
    return hashlib.sha256(array("i", ids).tobytes() + bytes(map(bool, learned))).digest()


class Fed:
    """Counts and hashes the rows of each step. The hash depends on the order of the steps, not on the order of rows in a step."""

    def __init__(self) -> None:
        self._chain = hashlib.sha256()
        self._rows: list[bytes] = []
        self._tokens = self._targets = self._squares = 0

    def row(self, ids: Sequence[int], learned: Sequence[bool]) -> None:
        """Add a row to the current step."""
        self._rows.append(row_digest(ids, learned))
        self._tokens += len(ids)
        self._targets += sum(map(bool, learned))
        self._squares += len(ids) ** 2

    def end_step(self) -> dict[str, int]:
        """End the step; return its rows, tokens, targets and sum of squared lengths."""
        self._chain.update(b"".join(sorted(self._rows)) + b"|")
        counts = {"rows": len(self._rows), "tokens": self._tokens, "targets": self._targets, "squares": self._squares}
        self._rows, self._tokens, self._targets, self._squares = [], 0, 0, 0
        return counts

    @property
    def digest(self) -> str:
        """The hash of all ended steps."""
        return self._chain.hexdigest()[:16]


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, without the memory of its parent at the fork."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Turn:
    """The trainer calls `between` before each step, including the first; `between` returns when the next step is requested."""

    def __init__(self) -> None:
        self.fed = Fed()
        self._commands: dict[str, Callable[[], dict[str, Any]]] = {}
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._requested = -1
        self._steps: list[dict[str, Any]] = []
        self._begin = 0.0

    def command(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Register another command that can be requested between two steps."""
        self._commands[name] = run

    def between(self, loss: float | None = None) -> None:
        """Record the ended step with its mean loss per target; if all requested steps are done, report them and wait for a request."""
        if self._requested < 0:
            self._send({"ready": True})
            self._wait()
            return
        self._steps.append({**self.fed.end_step(), "loss": loss})
        if len(self._steps) >= self._requested:
            seconds = time.perf_counter() - self._begin
            self._send({"seconds": seconds, "steps": self._steps, "hash": self.fed.digest, "peak": peak_memory()})
            self._wait()

    def _wait(self) -> None:
        for line in iter(sys.stdin.readline, ""):
            request = json.loads(line)
            if "go" in request:
                self._requested, self._steps, self._begin = int(request["go"]), [], time.perf_counter()
                return
            name = next(iter(request))
            if name not in self._commands:
                break
            self._send(self._commands[name]())
        leave()

    def _send(self, value: Mapping[str, Any]) -> None:
        print(json.dumps(value), file=self._out, flush=True)


def leave() -> NoReturn:
    """End the process at once, without the trainer's clean-up."""
    sys.stderr.flush()
    os._exit(0)


def task() -> dict[str, Any]:
    """Read the task from the file that is the only argument."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def read_rows(path: str) -> list[dict[str, list[int]]]:
    """Read rows with `input_ids` and `labels`, in the order of training."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
