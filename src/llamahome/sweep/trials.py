"""Runs the trials of a sweep, each as an own `llamahome train`, and reads from their files how far they are.

What a sweep knows is in its folder alone, so that it goes on from there after any end:

    trials/007/       the run, as of any train
    trials/007.log    what it printed
    trials/007.json   how it ended: `finished`, `failed` or `pruned`
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamahome import durable
from llamahome.checkpoint.state import STATE, TrainerState, first_evaluation, read_state
from llamahome.distributed.failures import tie_to_parent
from llamahome.errors import CheckpointError
from llamahome.monitoring.readings import moment, number, whole
from llamahome.monitoring.runs import read_records
from llamahome.rundir import RunPaths, open_run
from llamahome.sweep.grid import Trial
from llamahome.sweep.rungs import rung_step

_POLL_S = 0.1
_STOPPED, _LEFT_AT_ONCE = 75, 130
_MOST_INTERRUPTIONS = 3
"""How often somebody else may stop a trial without a new checkpoint in between."""
INTERRUPTED = "stopped by somebody else"
"""How the reason of a trial begins that was stopped too often."""


@dataclass(frozen=True)
class Progress:
    """What the files of a trial say."""

    state: str
    """`waiting`, `stopped` (goes on), `finished`, `failed`, or `pruned` once the whole sweep has ended."""
    reason: str = ""
    run_id: str = ""
    step: int = 0
    """Of the last checkpoint."""
    horizon: int = 0
    seconds: float = 0.0
    targets: int = 0
    """Held-out targets of an evaluation."""
    first: float | None = None
    """Held-out loss before training, nats per target."""
    losses: dict[int, float] = field(default_factory=dict)
    """Held-out loss by step, without step 0."""
    figure: str = "loss"
    """What the trial is ranked by."""
    scores: dict[int, float] = field(default_factory=dict)
    """The figure by step if it is not the loss; higher is better."""

    @property
    def figures(self) -> dict[int, float]:
        """What the trial is ranked by, by step, without step 0."""
        return self.losses if self.figure == "loss" else self.scores

    @property
    def ended(self) -> bool:
        """Whether nothing is left to run."""
        return self.state in ("finished", "failed")

    def rung(self, share: float) -> int | None:
        """The step at which it is compared, if a checkpoint is at or behind it."""
        step = rung_step(list(self.losses), self.horizon, share)
        return step if step is not None and self.step >= step else None


def read_progress(folder: Path, trial: Trial) -> Progress:
    """How far the trial is, by its files in the sweep's `folder`; a damaged record of its end counts as none."""
    try:
        record = json.loads((folder / "trials" / f"{trial.name}.json").read_text(encoding="utf-8"))
        by_step = {name: {int(step): float(value) for step, value in record.get(name, {}).items()} for name in ("losses", "scores")}
        return Progress(**{**record, **by_step})
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return _read_run(folder, trial)


def _read_run(folder: Path, trial: Trial, *, since: float = 0.0) -> Progress:
    """What the run's files say, with the evaluations after the time `since`, in Unix seconds."""
    root, figure = folder / "trials" / trial.name, trial.figure
    if not (root / "run_id").is_file():
        return Progress("waiting", figure=figure)
    paths = open_run(root)
    status = durable.read_object(paths.metrics_dir / "status.json")
    evaluations, scores = {}, {}
    for record in read_records(paths.metrics_dir / "metrics.jsonl").records:
        at, when = whole(record.get("step")), moment(record.get("t"))
        if "eval/loss" in record and at is not None and when is not None and when >= since:
            loss = number(record["eval/loss"])
            evaluations[at] = float("inf") if loss is None else float(loss)
            if at and (score := number(record.get(f"eval/{figure}"))) is not None and figure != "loss":
                scores[at] = float(score)
    first = evaluations.pop(0, None)
    step, seconds, targets = 0, 0.0, 0
    state = _saved_state(paths)
    if state is not None:
        step, seconds = state.step, state.elapsed_s
        targets = int(first_evaluation(state).get("targets", 0))
    finished = status.get("state") == "finished" and paths.final.is_dir()
    state_name = "finished" if finished else "stopped" if state else "waiting"
    reason = str(status.get("reason", "")) if finished else ""
    horizon = whole(status.get("horizon")) or 0
    return Progress(state_name, reason, paths.run_id, step, horizon, seconds, targets, first, evaluations, figure, scores)


def _saved_state(paths: RunPaths) -> TrainerState | None:
    """The state in the newest checkpoint whose state can be read, if there is one; an older one may be removed while this reads."""
    for _, path in reversed(paths.checkpoints()):
        with suppress(CheckpointError):
            if (path / "MANIFEST.json").is_file():
                return read_state(path / STATE)
    return None


def write_end(folder: Path, trial: Trial, progress: Progress) -> None:
    """Write down that the trial has ended; from then on `read_progress` returns this."""
    durable.write_whole(folder / "trials" / f"{trial.name}.json", json.dumps(asdict(progress)) + "\n")


@dataclass
class Runner:
    """Starts, watches and stops the processes of trials."""

    folder: Path
    train: Callable[[Trial, Path], list[str]]
    """The words after `llamahome` that start a trial in a folder."""
    slots: Sequence[Mapping[str, str]]
    """Environment variables of each process that may run at a time."""
    lock: int
    """File descriptor that trials inherit: whoever can lock it knows that no trial runs."""
    say: Callable[[str], None]
    asked: bool = False
    """Whether somebody asked the sweep to stop."""
    _running: dict[int, tuple[Trial, "subprocess.Popen[bytes]"]] = field(default_factory=dict)
    _told: set[int] = field(default_factory=set)
    _started: dict[int, float] = field(default_factory=dict)
    """Trial -> Unix time of its newest process."""
    _next_look: dict[int, float] = field(default_factory=dict)
    _interrupted: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Trial -> step of its checkpoint, and how often it was stopped there by somebody else."""

    def stop(self) -> None:
        """Ask all trials to save and end; a second call lets them leave at once. Safe in a signal handler."""
        number = signal.SIGTERM if self.asked else signal.SIGUSR1  # a trial that was told to pause may get SIGUSR1 again, not SIGTERM
        self.asked = True
        for _, process in list(self._running.values()):
            process.send_signal(number)

    def run(self, trials: Sequence[Trial], share: float) -> None:
        """Run each of `trials` until `share` of its steps, or to its end if that is 1. Returns early when asked to stop."""
        waiting = [trial for trial in trials if not self._is_done(trial, share)]
        while waiting or self._running:
            for slot in range(len(self.slots)):
                if waiting and slot not in self._running and not self.asked:
                    self._start(waiting.pop(0), slot)
            if self.asked and not self._running:
                return
            time.sleep(_POLL_S)
            for slot, (trial, process) in list(self._running.items()):
                if process.poll() is not None:
                    del self._running[slot]
                    self._told.discard(trial.number)
                    if self._note_end(trial, process.returncode, share):
                        waiting.insert(0, trial)
                elif share < 1 and trial.number not in self._told and self._is_at_rung(trial, share):
                    self._told.add(trial.number)
                    process.send_signal(signal.SIGUSR1)

    def _is_done(self, trial: Trial, share: float) -> bool:
        progress = read_progress(self.folder, trial)
        if progress.state == "finished":
            write_end(self.folder, trial, progress)
        return progress.ended or (share < 1 and progress.rung(share) is not None)

    def _is_at_rung(self, trial: Trial, share: float) -> bool:
        if time.monotonic() < self._next_look.get(trial.number, 0.0):
            return False
        begun = time.monotonic()
        # What a killed process has evaluated behind its last checkpoint is done again, so it does not count.
        progress = _read_run(self.folder, trial, since=self._started[trial.number])
        self._next_look[trial.number] = time.monotonic() + 20 * (time.monotonic() - begun)  # long runs have long files
        return rung_step(list(progress.losses), progress.horizon, share) is not None

    def _start(self, trial: Trial, slot: int) -> None:
        root = self.folder / "trials" / trial.name
        resumes = read_progress(self.folder, trial).state == "stopped"
        if not resumes and root.exists():
            self._remove(root)  # it was killed before its first checkpoint
        words = ["train-resume", str(root)] if resumes else self.train(trial, root)
        shown = ", ".join(f"{key}={value}" for key, value in trial.values.items())
        self.say(f"trial {trial.name} {'goes on' if resumes else 'starts'}: {shown or 'seed'}, seed {trial.seed}")
        started = time.time()
        with (self.folder / "trials" / f"{trial.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "llamahome", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.slots[slot]},
                pass_fds=[self.lock],
                process_group=0,  # Ctrl-C reaches the sweep alone, which then asks each trial once
                preexec_fn=_end_with(os.getpid()),
            )
        self._running[slot] = (trial, process)
        self._started[trial.number] = started
        if self.asked:  # the signal came while it was started
            process.send_signal(signal.SIGUSR1)

    def _remove(self, root: Path) -> None:
        paths = open_run(root)
        for folder in (paths.metrics_dir, paths.tensorboard_dir, root) if (root / "run_id").is_file() else (root,):
            shutil.rmtree(folder, ignore_errors=folder != root)

    def _note_end(self, trial: Trial, status: int, share: float) -> bool:
        """Write down how the trial ended if it has; returns whether it has to go on, because somebody else stopped it.

        The exit status of a pause at a rung and of a stop by somebody else are the same, so the files decide: a trial that is not behind
        the rung goes on.
        """
        progress = _read_run(self.folder, trial)
        if status == 0 and progress.state == "finished":
            write_end(self.folder, trial, progress)
            return False
        stopped = status < 0 or status in (_STOPPED, _LEFT_AT_ONCE)
        if self.asked or (stopped and self._is_done(trial, share)):
            return False
        if stopped:
            step, times = self._interrupted.get(trial.number, (progress.step, 0))
            times = times + 1 if step == progress.step else 1
            self._interrupted[trial.number] = progress.step, times
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            if times < _MOST_INTERRUPTIONS:
                self.say(f"trial {trial.name} was {INTERRUPTED} ({how}) after step {progress.step}")
                return True
            reason = f"{INTERRUPTED} ({how}) {times} times without a further checkpoint"
        else:
            reason = _reason(self.folder / "trials" / f"{trial.name}.log", status)
        write_end(self.folder, trial, Progress(**{**asdict(progress), "state": "failed", "reason": reason}))
        self.say(f"trial {trial.name} failed: {reason}")
        return False


def _end_with(parent: int) -> Callable[[], None]:
    """Run in a new process: Linux sends it SIGUSR1 when the sweep dies, even by SIGKILL. It then saves, or ends if it has not begun."""
    tied = tie_to_parent()

    def tie() -> None:
        tied()
        if os.getppid() != parent:
            os._exit(1)

    return tie


def _reason(log: Path, status: int) -> str:
    """The last error that the trial printed, or its exit status."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"error\[", line)]
    if errors:
        return errors[-1]
    return f"exit status {status}, see {log}"


def best_of(progress: Progress) -> tuple[int, float] | None:
    """Step and value of the best held-out figure, the earlier of equal ones."""
    sign = 1 if progress.figure == "loss" else -1
    return min(progress.figures.items(), key=lambda item: (sign * item[1], item[0])) if progress.figures else None


def shortened(progress: Progress, step: int) -> Progress:
    """`progress` as it was after `step`: what the table shows of a pruned trial, wherever its signal has met it."""
    losses, scores = ({at: value for at, value in each.items() if at <= step} for each in (progress.losses, progress.scores))
    values: dict[str, Any] = {**asdict(progress), "state": "pruned", "step": step, "losses": losses, "scores": scores}
    return Progress(**values)
