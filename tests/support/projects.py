"""A scratch project as a user has one: a tiny real model, small data, settings, and commands typed in its folder.

`type` runs a command through tests/support/prompt.py (a fork with the imports done); `start` and `shell` run `python -m llamahome` itself.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llamahome.rundir import PROCESSED_DATA, RunPaths, open_run

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("the", "cat", "sat", "on", "mat", "what", "is", "capital", "of", "France", "Paris", "hello", "there", "how", "are", "you", "fine")
SETTINGS = """\
training:
  batch_size: 4
  epochs: 1
  mixed_precision: false
  learning_rate: 0.01
model:
  name: tiny
evaluation:
  sample_prompts: 0
data:
  eval_split: 4
"""
Strike = tuple[str, int, list[str]]
"""Where (module:function, or module:function?text to count only calls with that text), at which call, and which signals."""


def sentence(source: random.Random) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(3, 14)))


def chats(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in the `messages` format: one question and one answer, every row its own."""
    source = random.Random(seed)
    return [
        {"messages": [{"role": "user", "content": f"{n}: {sentence(source)}?"}, {"role": "assistant", "content": sentence(source)}]}
        for n in range(count)
    ]


def pairs(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with two answers; every one that ends with "Paris" is the better one."""
    source = random.Random(seed)
    return [
        {"prompt": f"{n}: {sentence(source)}?", "chosen": f"{sentence(source)} Paris", "rejected": f"{sentence(source)} mat"}
        for n in range(count)
    ]


def labelled(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with one answer; it is good if it ends with "Paris"."""
    source, word = random.Random(seed), {True: "Paris", False: "mat"}
    return [
        {"prompt": f"{n}: {sentence(source)}?", "completion": f"{sentence(source)} {word[n % 2 == 0]}", "label": n % 2 == 0}
        for n in range(count)
    ]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Answer:
    """What a command came to."""

    words: tuple[str, ...]
    status: int
    out: str
    err: str

    @property
    def codes(self) -> list[str]:
        """Codes of the error blocks on stderr, in order."""
        return re.findall(r"^error\[([^\]]+)\]", self.err, flags=re.MULTILINE)

    @property
    def helps(self) -> list[str]:
        return re.findall(r"^help: (.*)$", self.err, flags=re.MULTILINE)

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def expect(self, status: int) -> "Answer":
        """This answer; AssertionError with everything that was printed when the exit status is another one."""
        assert self.status == status, f"{' '.join(self.words)}\nexit status {self.status}, not {status}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        return self


class Prompt:
    """The process behind `Project.type`; one command at a time, and one more for each lane."""

    pid: int | None = None
    """The process of the command that runs."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.prompt"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._to, self._from = self._process.stdin, self._process.stdout
        try:
            self._read()
        except AssertionError:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        line = self._from.readline()
        assert line, "the prompt has ended"
        return json.loads(line)

    def _say(self, command: dict[str, Any]) -> dict[str, Any]:
        self._to.write(json.dumps(command) + "\n")
        self._to.flush()
        return self._read()

    def run(self, command: dict[str, Any]) -> int:
        """The exit status; negative for a signal."""
        self.pid = self._say(command)["pid"]
        try:
            return self._read()["status"]
        finally:
            self.pid = None

    def lane(self, folder: Path) -> "Lane":
        """A fork of the prompt whose commands run at the same time; `folder` gets its named pipes."""
        folder.mkdir()
        pipes = [str(folder / name) for name in ("in", "out")]
        for pipe in pipes:
            os.mkfifo(pipe)
        self._say({"lane": pipes})
        return Lane(*pipes)

    def close(self) -> None:
        self._to.close()
        self._process.wait(timeout=60)
        self._from.close()


class Lane(Prompt):
    """A fork of a prompt; it ends when it is closed."""

    def __init__(self, incoming: str, outgoing: str) -> None:
        self._to = open(incoming, "w", encoding="utf-8")  # noqa: SIM115 - `close` closes it
        self._from = open(outgoing, encoding="utf-8")  # noqa: SIM115
        self._read()

    def close(self) -> None:
        self._to.close()
        assert self._from.read() == "", "the lane has ended"
        self._from.close()


@dataclass
class Project:
    """A folder and commands typed in it."""

    folder: Path
    prompt: Prompt
    _typed: int = field(default=0)

    def type(
        self, *words: str, stdin: str = "", at: Sequence[Strike] = (), after: tuple[float, str] | None = None, **variables: str
    ) -> Answer:
        """Run `llamahome <words>` here to its end; `after` is a time in seconds and the signal that the command gets then."""
        self._typed += 1
        streams = self.folder.with_name(f"{self.folder.name}.streams")
        streams.mkdir(exist_ok=True)
        files = {name: streams / f"{self._typed}.{name}" for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_text(stdin, encoding="utf-8")
        command = {"words": words, "folder": str(self.folder), "variables": variables, "at": at, "after": after}
        status = self.prompt.run({**command, **{name: str(path) for name, path in files.items()}})
        out, err = (files[name].read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return Answer(("llamahome", *words), status, out, err)

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        """`python -m llamahome <words>` as a process that the caller waits for."""
        return subprocess.Popen(
            [sys.executable, "-m", "llamahome", *words],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def shell(self, *words: str, timeout: float = 240, **variables: str) -> Answer:
        """`python -m llamahome <words>` to its end."""
        with self.start(*words, **variables) as process:
            out, err = process.communicate(timeout=timeout)
        return Answer(("llamahome", *words), process.returncode, out, err)

    @property
    def run(self) -> "RunFiles":
        """The run that output/training points to."""
        return RunFiles(self.folder, self.folder / "output/training")

    def runs(self) -> list[str]:
        """Ids of the runs under output/runs."""
        return sorted(path.name for path in (self.folder / "output/runs").glob("*"))

    def files(self) -> dict[str, bytes]:
        """Every file of the project but caches with its content, to see that a command changed nothing."""
        files = {path.relative_to(self.folder): path for path in sorted(self.folder.rglob("*")) if path.is_file()}
        return {str(name): path.read_bytes() for name, path in files.items() if not name.is_relative_to(PROCESSED_DATA)}


@dataclass(frozen=True)
class RunFiles:
    """What a run wrote, read without llamahome's readers."""

    project: Path
    root: Path

    @cached_property
    def paths(self) -> RunPaths:
        return open_run(self.root)

    @property
    def checkpoints(self) -> list[int]:
        return [step for step, _ in self.paths.checkpoints()]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Records of metrics, events, system or samples."""
        path = self.project / self.paths.metrics_dir / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def by_step(self, metric: str) -> dict[int, float]:
        """The metric of each step; AssertionError when a step has it twice."""
        found = [(line["step"], line[metric]) for line in self.lines("metrics") if metric in line]
        assert len(found) == len(dict(found)), f"{metric} is recorded twice: {found}"
        return dict(found)

    def weights(self, folder: str = "final") -> dict[str, bytes]:
        """The files of a model folder but the configuration that names paths."""
        return {path.name: path.read_bytes() for path in sorted((self.root / folder).glob("*.safetensors"))}


def wait_until(true: Any, *, seconds: float = 60.0) -> None:
    """Poll until `true()`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
