"""Which checkpoints stay: the last k, the best by evaluation loss, and never less than one that was verified.

Only folders whose manifest names this run are touched. Each is renamed out of sight before it is removed, so that a kill in
between never leaves a half checkpoint under its name.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from llamahome.checkpoint import manifest
from llamahome.checkpoint.state import read_state
from llamahome.checkpoint.store import STATE
from llamahome.errors import CheckpointError, Problem
from llamahome.rundir import RunPaths


def which_to_delete(
    checkpoints: Sequence[tuple[int, float | None]], *, keep_last: int, keep_best: int, newest_verified: int | None
) -> list[int]:
    """Steps that may go, oldest first, given (step, evaluation loss or None) of each.

    Nothing goes while none is verified. Checkpoints newer than the newest verified one are left alone and do not count.
    Of equal losses the later step counts as better.
    """
    if newest_verified is None:
        return []
    sound = sorted((step, loss) for step, loss in checkpoints if step <= newest_verified)
    by_loss = sorted((loss, -step) for step, loss in sound if loss is not None and math.isfinite(loss))
    kept = {step for step, _ in sound[-max(1, keep_last) :]} | {-step for _, step in by_loss[: max(0, keep_best)]} | {newest_verified}
    return [step for step, _ in sound if step not in kept]


def apply(paths: RunPaths, *, keep_last: int, keep_best: int, warn: Callable[[Problem], None]) -> list[int]:
    """Verify the newest checkpoint, then remove what retention does not keep; the removed steps.

    `warn` is told of a damaged newest one and of folders that could not be removed. Called by one process only.
    """
    for trash in paths.root.glob(".trash-checkpoint-*"):
        shutil.rmtree(trash, ignore_errors=True)
    losses, newest_verified = {}, None
    for step, folder in reversed(paths.checkpoints()):
        if not _is_ours(folder, paths.run_id):
            continue
        if newest_verified is None:
            problems = manifest.verify(folder)
            for problem in problems:
                warn(problem)
            newest_verified = None if problems else step
        losses[step] = _evaluation_loss(folder)
    removed = []
    for step in which_to_delete(list(losses.items()), keep_last=keep_last, keep_best=keep_best, newest_verified=newest_verified):
        folder = paths.checkpoint(step)
        try:
            shutil.rmtree(folder.rename(folder.with_name(f".trash-{folder.name}")))
        except OSError as error:
            message = f"an old checkpoint could not be removed: {error.strerror}; it takes up space and is otherwise harmless"
            warn(Problem(code="checkpoint.delete-failed", message=message, where=str(folder)))
        else:
            removed.append(step)
    return removed


def set_aside(paths: RunPaths, *, after: int) -> list[Path]:
    """Rename this run's checkpoints of later steps to `superseded-checkpoint-<step>`: resuming an older one begins another course.

    Nothing is deleted; `latest` no longer finds them. Returns the new folders. Called by one process only.
    """
    moved = []
    for step, folder in paths.checkpoints():
        if step > after and _is_ours(folder, paths.run_id):
            aside = folder.with_name(f"superseded-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(folder.rename(aside))
    return moved


def _is_ours(folder: Path, run_id: str) -> bool:
    if folder.is_symlink():
        return False
    try:
        return manifest.read(folder).run_id == run_id
    except CheckpointError:
        return False


def _evaluation_loss(folder: Path) -> float | None:
    try:
        state = read_state(folder / STATE)
    except CheckpointError:
        return None
    return state.best_loss if state.eval_loss is None and state.best_step == state.step else state.eval_loss
