"""The proof that a run resumes bit for bit, on this machine, with this model, data and settings.

Three runs of the same command as processes of their own: one undisturbed, one that is killed with SIGKILL after its first checkpoint, and
its resume. Then every tensor of model and optimizer, and the position in the data, are compared. Nothing stays but the answer.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamahome.checkpoint import manifest
from llamahome.checkpoint.state import STATE
from llamahome.checkpoint.store import MODEL, TENSORS, read_tensors
from llamahome.distributed.failures import tie_to_parent
from llamahome.errors import CheckpointError, LlamaHomeError, Problem
from llamahome.monitoring.runs import read_records
from llamahome.rundir import NEWEST, RUNS, open_run
from llamahome.units import show_seconds

_ATTEMPTS = 3
"""If the steps are so short that the run ends before it can be killed, the proof is done again with four times as many."""
_CLOCKS = ("elapsed_s", "micro_batch_tokens")
"""Fields of a state that depend on the time that a run took."""


class ChildFailed(LlamaHomeError):
    """A run of the proof failed; `exit_status` and the problem's excerpt are its own."""

    def __init__(self, problem: Problem, status: int) -> None:
        super().__init__([problem])
        self.exit_status = status


@dataclass(frozen=True)
class Proof:
    """What was compared, and the first thing that differs."""

    tensors: int
    first_difference: str | None
    steps: int
    killed_after: int
    """The last step of which the killed run had written a record."""
    resumed_from: int
    deterministic: bool = True
    """False if two undisturbed runs differ from each other, too: then the machine computes differently each time."""

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return self.first_difference is None


def verify_resume(words: Sequence[str], *, steps: int, beside: Path | None = None, say: Callable[[str], None]) -> Proof:
    """Run the proof with `words`, the arguments of `llamahome train`, for `steps` steps. Its runs lie in the folder `beside` until it ends.

    Raises ChildFailed when a run fails by itself, CheckpointError checkpoint.not-killed when every step is too short to be interrupted.
    """
    for _ in range(_ATTEMPTS):
        with _scratch(beside or RUNS.parent) as scratch:
            proof = _attempt(words, steps, scratch, say)
        if proof is not None:
            return proof
        say(f"the run ended before it could be killed, because its steps are short; again with {4 * steps} steps")
        steps *= 4
    message = f"the run ended before it could be killed, also with {steps // 4:,} steps"
    raise CheckpointError(Problem(code="checkpoint.not-killed", message=message, hint=f"--steps {steps}"))


def _attempt(words: Sequence[str], steps: int, scratch: Path, say: Callable[[str], None]) -> Proof | None:
    """The proof, or None if the run could not be killed in time."""
    straight, killed = scratch / "undisturbed", scratch / "killed"
    first = max(1, steps // 3)
    started = time.monotonic()
    say(f"1/3 an undisturbed run of {steps} steps")
    _finish(_start(_train(words, straight, steps, first), straight))
    say(f"    {show_seconds(time.monotonic() - started)}")
    say("2/3 the same run, killed with SIGKILL after its first checkpoint")
    if not _kill_in_between(_start(_train(words, killed, steps, first), killed), killed, first, _step_seconds(straight)):
        return None
    saved = [step for step, folder in open_run(killed).checkpoints() if not manifest.verify(folder)]
    reached = _last_step(killed)
    say(f"    killed after step {reached}, with checkpoint-{saved[-1]} on the disk")
    say(f"3/3 the killed run, resumed from step {saved[-1]}")
    _finish(_start(["train-resume", str(killed)], killed))
    last = f"checkpoint-{steps}"
    tensors, difference = compare(straight / last, killed / last)
    if difference is None:
        return Proof(tensors, None, steps, reached, saved[-1])
    say("they differ; an undisturbed run once more, to see whether two of them are equal")
    again = scratch / "again"
    _finish(_start(_train(words, again, steps, first), again))
    deterministic = compare(straight / last, again / last)[1] is None
    return Proof(tensors, difference, steps, reached, saved[-1], deterministic)


def compare(one: Path, other: Path) -> tuple[int, str | None]:
    """The number of tensors of the checkpoint `one`, and the first thing in which `other` differs."""
    tensors = 0
    for folder in (MODEL, TENSORS):
        left, right = read_tensors(one / folder), read_tensors(other / folder)
        if missing := sorted(left.keys() ^ right.keys()):
            return tensors, f"{folder}: {missing[0]} is in one checkpoint only"
        for name, tensor in left.items():
            tensors += 1
            if (what := _difference(tensor, right[name])) is not None:
                return tensors, f"{folder}: {name}: {what}"
    mine, theirs = (json.loads((each / STATE).read_text(encoding="utf-8")) for each in (one, other))
    fields = (name for name in sorted(mine) if name not in (*_CLOCKS, "extra") and mine[name] != theirs[name])
    changed = next(fields, None)
    return tensors, None if changed is None else f"{STATE}: {changed}: {mine[changed]} and {theirs[changed]}"


def _difference(one: torch.Tensor, other: torch.Tensor) -> str | None:
    """What differs between the bytes of two tensors."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    if torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)):
        return None
    return f"greatest difference {(one.double() - other.double()).abs().max().item():.3g}"


def _train(words: Sequence[str], folder: Path, steps: int, every: int) -> list[str]:
    """The arguments of one run. The learning rate is that of a run of `steps` steps."""
    settings: dict[str, Any] = {
        "checkpoint.every": f"{every} steps",
        "checkpoint.keep_last": steps,
        "evaluation.every": f"{steps} steps",
        "evaluation.rows": 16,
        "evaluation.sample_prompts": 0,
        "monitoring.tensorboard": "false",
        "output.dir": folder,
        "training.max_steps": steps,
        "training.max_time": "null",
    }
    return ["train", *words, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]


def _start(arguments: Sequence[str], folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A process of the command line in a session of its own, and the file with what it writes."""
    log = folder.with_suffix(".log")
    with log.open("ab") as sink:
        command = [sys.executable, "-m", "llamahome", *arguments]
        tie = tie_to_parent()  # however the proof ends, no run of it stays
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True, preexec_fn=tie), log


def _finish(started: tuple[subprocess.Popen[bytes], Path]) -> None:
    """Wait for a run; a KeyboardInterrupt kills it. Raises ChildFailed."""
    process, log = started
    try:
        status = process.wait()
    except BaseException:
        _kill(process)
        raise
    if status:
        _raise_failure(status, log)


def _raise_failure(status: int, log: Path) -> None:
    """Raise the error of a run that failed, with the end of what it wrote."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith("error[")), max(0, len(lines) - 20))
    message = f"a run of the proof ended with status {status}"
    raise ChildFailed(Problem(code="checkpoint.proof-failed", message=message, excerpt="\n".join(lines[begin:])), max(1, status))


def _kill_in_between(started: tuple[subprocess.Popen[bytes], Path], folder: Path, first: int, step_s: float) -> bool:
    """Kill a run at a random moment of the steps after its first checkpoint; False if it had already ended."""
    process, log = started
    committed = folder / f"checkpoint-{first}" / manifest.NAME
    try:
        while not committed.exists():
            if process.poll() is not None:
                break
            time.sleep(0.002)
        time.sleep(random.SystemRandom().uniform(0, step_s))
    finally:
        ended = process.poll()
        _kill(process)
    if ended:
        _raise_failure(ended, log)
    return ended is None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group at once; processes that it started in other groups end with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _records(folder: Path) -> list[dict[str, Any]]:
    return read_records(open_run(folder).metrics_dir / "metrics.jsonl").records


def _last_step(folder: Path) -> int:
    return max((record["step"] for record in _records(folder) if "train/loss" in record), default=0)


def _step_seconds(folder: Path) -> float:
    """The median time of a step, as its parts were recorded."""
    times = [sum(value for name, value in record.items() if name.startswith("time/") and value) for record in _records(folder)]
    return sorted(times)[len(times) // 2] if times else 0.0


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder in `parent`. At its end it is removed with the metrics of its runs, and output/training points where it did before."""
    parent.mkdir(parents=True, exist_ok=True)
    newest = NEWEST.readlink() if NEWEST.is_symlink() else None
    folder = Path(tempfile.mkdtemp(prefix=".verify-resume-", dir=parent))
    try:
        yield folder
    finally:
        for run in folder.iterdir():
            if (run / "run_id").is_file():
                shutil.rmtree(open_run(run).metrics_dir, ignore_errors=True)
        inside = NEWEST.is_symlink() and NEWEST.resolve().is_relative_to(folder.resolve())
        shutil.rmtree(folder, ignore_errors=True)
        if inside:
            NEWEST.unlink()
            if newest is not None:
                NEWEST.symlink_to(newest)
