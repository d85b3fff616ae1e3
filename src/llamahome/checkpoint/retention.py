"""Deletes old checkpoints: keeps the last k, the best by evaluation.metric, a ladder of ages, and always the newest one that was verified.

Only folders whose manifest names this run are touched. Each folder is renamed before it is deleted, so that a kill in between never leaves
a partial checkpoint under its name.
"""

import bisect
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llamahome import durable
from llamahome.checkpoint import manifest
from llamahome.checkpoint.state import STATE, TrainerState, judged_by, judged_cost, read_state
from llamahome.errors import CheckpointError, Problem
from llamahome.rundir import RunPaths


def oldest_of_ages(elapsed: Mapping[int, float], ages: Sequence[float]) -> set[int]:
    """The steps that a ladder of ages keeps: the oldest checkpoint in each interval between two ages, and the oldest beyond the last.

    `elapsed` maps the step of each checkpoint to the seconds trained until it; the age of a checkpoint is counted back from the newest.
    `ages` are seconds. Because the oldest of an interval stays until it is old enough for the next one, no interval runs empty for good.
    """
    newest = max(elapsed.values(), default=0.0)
    rungs: dict[int, int] = {}
    for step in sorted(elapsed):
        rungs.setdefault(bisect.bisect_right(sorted(ages), newest - elapsed[step]), step)
    return set(rungs.values()) if ages else set()


def which_to_delete(
    checkpoints: Sequence[tuple[int, float | None]], *, keep_last: int, keep_best: int, newest_verified: int | None
) -> list[int]:
    """The steps to delete, oldest first, given (step, cost of its evaluation or None) of each checkpoint.

    Without a verified checkpoint nothing is deleted. Checkpoints newer than the newest verified one are kept and do not count.
    A lower cost is better, and of equal ones the earlier step.
    """
    if newest_verified is None:
        return []
    candidates = sorted((step, loss) for step, loss in checkpoints if step <= newest_verified)
    by_loss = sorted((loss, step) for step, loss in candidates if loss is not None and math.isfinite(loss))
    kept = {step for step, _ in candidates[-max(1, keep_last) :]} | {step for _, step in by_loss[: max(0, keep_best)]} | {newest_verified}
    return [step for step, _ in candidates if step not in kept]


def deletable(
    paths: RunPaths, *, keep_last: int, keep_best: int, keep_ages: Sequence[float] = (), warn: Callable[[Problem], None]
) -> list[int]:
    """Verify the newest checkpoint and return the steps that retention does not keep, oldest first; nothing is changed.

    `keep_ages` are seconds of training. `warn` gets the problems of a damaged newest checkpoint.
    """
    states: dict[int, TrainerState | None] = {}
    newest_verified = None
    for step, folder in reversed(paths.checkpoints()):
        if not _belongs_to(folder, paths.run_id):
            continue
        if newest_verified is None:
            problems = manifest.verify(folder)
            for problem in problems:
                warn(problem)
            newest_verified = None if problems else step
        states[step] = _state(folder)
    newest = next((state for state in states.values() if state is not None), None)
    metric = judged_by(newest) if newest is not None else "loss"  # values of an earlier metric do not compare
    losses = [(step, None if state is None else judged_cost(state, metric)) for step, state in states.items()]
    steps = which_to_delete(losses, keep_last=keep_last, keep_best=keep_best, newest_verified=newest_verified)
    ladder = oldest_of_ages({step: state.elapsed_s for step, state in states.items() if state is not None}, keep_ages)
    return [step for step in steps if step not in ladder]


def apply(
    paths: RunPaths, *, keep_last: int, keep_best: int, keep_ages: Sequence[float] = (), warn: Callable[[Problem], None]
) -> list[int]:
    """Delete what `deletable` returns; returns the deleted steps. Called by one process only.

    `warn` also gets the problems of folders that could not be deleted.
    """
    for trash in paths.root.glob(".trash-checkpoint-*"):
        shutil.rmtree(trash, ignore_errors=True)
    deleted = []
    for step in deletable(paths, keep_last=keep_last, keep_best=keep_best, keep_ages=keep_ages, warn=warn):
        folder = paths.checkpoint(step)
        try:
            durable.remove_folder(folder)
        except OSError as error:
            message = f"an old checkpoint could not be deleted: {error.strerror}; it only takes up space"
            warn(Problem(code="checkpoint.delete-failed", message=message, where=str(folder)))
        else:
            deleted.append(step)
    return deleted


def set_aside(paths: RunPaths, *, after: int) -> list[Path]:
    """Rename this run's checkpoints of later steps to `superseded-checkpoint-<step>`, because an older one is resumed.

    Nothing is deleted, but `latest` no longer finds them. Returns the new folders. Called by one process only.
    """
    moved = []
    for step, folder in paths.checkpoints():
        if step > after and _belongs_to(folder, paths.run_id):
            aside = folder.with_name(f"superseded-{folder.name}")
            durable.remove_tree(aside)
            durable.rename(folder, aside)
            moved.append(aside)
    return moved


def _belongs_to(folder: Path, run_id: str) -> bool:
    if folder.is_symlink():
        return False
    try:
        found = manifest.read(folder)
        return found.run_id == run_id and folder.name == f"checkpoint-{found.step}"
    except CheckpointError:
        return False


def _state(folder: Path) -> TrainerState | None:
    try:
        return read_state(folder / STATE)
    except CheckpointError:
        return None
