"""The course of a sweep: its folder and lock, its rounds, and sweep.json and sweep.csv at its end."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome import durable
from llamahome.errors import ConfigError, Problem
from llamahome.redaction import redact_words
from llamahome.rundir import SWEEP_FILE, TRIALS, as_typed, free_beside, refuse_unwritable
from llamahome.sweep.grid import Grid, Trial
from llamahome.sweep.rungs import FEWEST_SETTINGS, RUNGS, pruned
from llamahome.sweep.table import Row, as_csv, best_trial, draw, make_rows, records
from llamahome.sweep.trials import INTERRUPTED, Progress, Runner, read_progress, shortened, write_end

SWEEPS = Path("output/sweeps")
_PASSING = (INTERRUPTED, "error[machine.")
"""How reasons begin that may be gone with the next command, such as a full disk: the trial gets another chance."""
_SAVING_S = 120.0
"""How long trials whose sweep was killed may take to save."""


def fingerprint(data_paths: Sequence[str], grid: Grid, *, prune: bool) -> str:
    """Eight letters that are equal for the same rows' paths, the same trials and the same settings of each."""
    described = [list(data_paths), prune]
    described += [[loaded.config.model_dump(mode="json"), trial.values] for trial, loaded in zip(grid.trials, grid.loaded, strict=True)]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]


def content_of(files: Iterable[str]) -> str:
    """Letters that are equal for equal names and bytes of `files`, read in full: sizes and times would not show every change."""
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(set(files)):
        with Path(name).open("rb") as file:
            whole.update(os.path.relpath(name).encode("utf-8", "surrogateescape") + b"\0")
            whole.update(hashlib.file_digest(file, "blake2b").digest())
    return whole.hexdigest()


def open_folder(folder: Path, mark: str, content: str, command: Sequence[str], *, say: Callable[[str], None]) -> int:
    """Make or open the folder of a sweep and lock it; returns the descriptor of the lock, which the trials inherit.

    `mark` is the fingerprint of the settings, `content` that of the data's bytes. Raises ConfigError if the folder holds something else,
    or a sweep with other settings or of other rows, or one that runs.
    """
    described = folder / SWEEP_FILE
    refuse_unwritable(folder)
    if not described.is_file() and _holds_something(folder):
        message = "the folder is not empty and holds no sweep"
        raise ConfigError(Problem(code="sweep.not-a-sweep", message=message, where=str(folder), hint=f"--output {free_beside(folder)}"))
    (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    if described.is_file():
        known = _described(described)
        if known["fingerprint"] != mark:
            message = "the folder holds a sweep with other settings, values or data files"
            hint = f"--output {free_beside(folder)}"
            raise ConfigError(Problem(code="sweep.other-settings", message=message, where=str(folder), hint=hint))
        if known["content"] != content:
            message = "the rows have changed since the sweep began, so its runs could not be compared"
            hint = f"--output {free_beside(folder)}"
            raise ConfigError(Problem(code="sweep.other-data", message=message, where=str(folder), hint=hint))
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    _wait_for(lock, folder, say)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    if not described.is_file():
        durable.write_whole(described, json.dumps({"fingerprint": mark, "content": content, "command": redact_words(command)}) + "\n")
    for end in (folder / TRIALS).glob("*.json"):
        if _may_have_passed(end):
            end.unlink()
    return lock


def _described(path: Path) -> dict[str, str]:
    """The marks of the sweep that the file `path` describes. Raises ConfigError if it cannot be read."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: known[name] for name in ("fingerprint", "content")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"{path.name} is damaged, so nobody knows which sweep the folder holds"
        raise ConfigError(
            Problem(code="sweep.not-a-sweep", message=message, where=str(path.parent), hint=f"--output {free_beside(path.parent)}")
        ) from error


def _may_have_passed(end: Path) -> bool:
    """Whether a trial gets another chance: the reason of its end may be gone, or the record of its end is damaged."""
    try:
        return str(json.loads(end.read_text(encoding="utf-8"))["reason"]).startswith(_PASSING)
    except (ValueError, TypeError, KeyError):
        return True


def _holds_something(folder: Path) -> bool:
    """Whether there is more in `folder` than a sweep leaves that was killed at its very beginning."""
    if not folder.is_dir():
        return folder.exists()
    trials = folder / TRIALS
    others = (path.name for path in folder.iterdir() if path.name not in (TRIALS, "lock"))
    return any(not name.startswith(f".{SWEEP_FILE}.") for name in others) or (trials.is_dir() and any(trials.iterdir()))


def _wait_for(lock: int, folder: Path, say: Callable[[str], None]) -> None:
    told, begun = False, time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode() or "0"
            if (int(owner) and Path(f"/proc/{owner}").exists()) or time.monotonic() - begun > _SAVING_S:
                message = f"the sweep runs already, in process {owner}"
                raise ConfigError(Problem(code="sweep.running", message=message, where=str(folder))) from None
            if not told:
                say("waiting for the trials of the earlier sweep to save")
            told = True
            time.sleep(0.2)


@dataclass(frozen=True)
class Standing:
    """How far a sweep is."""

    rows: list[Row]
    complete: bool


def run_rounds(runner: Runner, trials: Sequence[Trial], *, prune: bool) -> Standing:
    """Run all trials, round by round; stops early when the runner was asked to."""
    folder = runner.folder
    out: dict[int, int] = {}
    prune = prune and len({trial.setting for trial in trials}) >= FEWEST_SETTINGS
    for share in (*(RUNGS if prune else ()), 1.0):
        alive = [trial for trial in trials if trial.number not in out]
        runner.run(alive, share)
        if runner.asked:
            break
        if share < 1:
            for trial, step in _pruned_at(folder, alive, share):
                out[trial.number] = step
                runner.say(f"trial {trial.name} is pruned after step {step}: plainly worse")
    pairs: list[tuple[Trial, Progress]] = []
    for trial in trials:
        progress = read_progress(folder, trial)
        pairs.append((trial, shortened(progress, out[trial.number]) if trial.number in out else progress))
    complete = all(progress.ended or progress.state == "pruned" for _, progress in pairs)
    if complete:  # their checkpoints may go now, and the same command again must not run them
        for trial, progress in pairs:
            if progress.state == "pruned":
                write_end(folder, trial, progress)
    return Standing(make_rows(pairs), complete)


def _pruned_at(folder: Path, alive: Sequence[Trial], share: float) -> list[tuple[Trial, int]]:
    """The trials to stop at this rung and the step of each; all seeds of a setting together."""
    found = {trial.number: read_progress(folder, trial) for trial in alive}
    running = [trial for trial in alive if found[trial.number].state != "failed"]
    steps = {trial.number: found[trial.number].rung(share) for trial in running}
    firsts = [first for trial in running if (first := found[trial.number].first) is not None]
    if not firsts or any(step is None for step in steps.values()):
        return []
    losses: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for trial in running:
        losses.setdefault(trial.setting, []).append(found[trial.number].losses[steps[trial.number] or 0])
    noise = max(2 / max(1, found[trial.number].targets) ** 0.5 for trial in running)
    worse = pruned(max(firsts), losses, noise=noise)
    return [(trial, step) for trial in running if trial.setting in worse and (step := steps[trial.number]) is not None]


def write_results(folder: Path, standing: Standing, command: Sequence[str], best: str | None) -> dict[str, Any]:
    """Write sweep.json, sweep.csv and sweep.svg; returns what sweep.json holds."""
    trial = best_trial(standing.rows)
    result = {
        "folder": as_typed(folder),
        "state": "finished" if standing.complete else "stopped",
        "command": redact_words(command),
        "best": {"trial": trial.name, "values": trial.values, "seed": trial.seed, "command": best} if trial and best else None,
        "trials": records(standing.rows),
    }
    texts = {"sweep.json": json.dumps(result, indent=2) + "\n", "sweep.csv": as_csv(standing.rows), "sweep.svg": draw(standing.rows)}
    for name, text in texts.items():
        durable.write_whole(folder / name, text)
    return result


def remove_models(folder: Path, trials: Sequence[Trial], *, keep: Trial | None) -> int:
    """Remove the models and checkpoints of all trials but `keep`; how many trials lost theirs. Only after the sweep has finished."""
    removed = 0
    for trial in trials:
        root = folder / "trials" / trial.name
        if trial == keep or not root.is_dir():
            continue
        models = [path for path in root.iterdir() if path.name == "final" or path.name.startswith("checkpoint-")]
        for path in models:
            shutil.rmtree(path)
        removed += bool(models)
    return removed
