"""Back to the last good checkpoint after too many refused steps, past their rows.

The checkpoint is one of before the refused steps. The rows of these steps and of the applied step before them, whose update may be the
cause, are passed over; without that, the same steps would end the same way, because they depend on nothing but data, seed and step.
A run that is killed after it went back resumes from that checkpoint, refuses the same steps and goes back again: to the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llamahome.assembly import Job
from llamahome.checkpoint import manifest, retention, store
from llamahome.checkpoint.state import TrainerState
from llamahome.data.steps.order import Ranges, pass_over
from llamahome.model.adapter import restore_model
from llamahome.monitoring.recorder import Recorder
from llamahome.resuming import PASSED, count_rollbacks, passed_over, show_rows
from llamahome.rundir import RunPaths, as_typed
from llamahome.training.optimizer import restore_optimizer
from llamahome.training.recovery import RunDiverged, Streak
from llamahome.units import many


@dataclass(frozen=True)
class Rollback:
    """To where a run goes back."""

    checkpoint: Path
    passed: Ranges
    """All positions that are passed over from now on."""
    number: int
    """How often the run has gone back, this time included."""


def plan_rollback(job: Job, paths: RunPaths, state: TrainerState, error: RunDiverged, recorder: Recorder) -> Rollback | None:
    """Decide whether and where to go back; all ranks call it. None if training.max_rollbacks is reached or no checkpoint is good.

    `state` is where the run began or went back to last.
    """
    streak, number = error.streak, count_rollbacks(state) + 1
    if streak is None or number > job.config.training.max_rollbacks:
        return None
    world, last = job.session.world, streak.steps[-1][0]
    folder = world.broadcast_object(str(_last_good(paths, streak.steps[0][0]) or "") if world.is_main else None)
    if not folder:
        return None
    steps = _steps_to_pass(streak, after=_step_of(Path(folder)))
    rows = _rows(job, steps, passed_over(state))
    recorder.event(
        "rolled-back",
        step=_step_of(Path(folder)),
        from_step=last,
        checkpoint=Path(folder).name,
        rollback=number,
        rows=job.data.prepared.places(rows),
        show=show_rows(job.data.paths, paths, rows),
    )
    job.session.progress.warn(
        f"{len(streak.steps)} steps in a row were refused, up to step {last}: back to {as_typed(Path(folder))}",
        f"{many(len(rows), 'row')} will not be seen again in this epoch: {show_rows(job.data.paths, paths, rows)}",
    )
    return Rollback(Path(folder), pass_over(passed_over(state), steps), number)


def roll_back(job: Job, paths: RunPaths, rollback: Rollback) -> TrainerState:
    """Restore weights and optimizer; later checkpoints are set aside. All ranks call it. Returns the state to go on from."""
    saved, learner = store.load(rollback.checkpoint), job.learner
    restore_model(learner.saved, saved.model_dir, learner.placement)
    learner.optimizer.state.clear()
    learner.optimizer.zero_grad(set_to_none=True)
    restore_optimizer(learner.optimizer, learner.placement.parameters, saved.optimizer_tensors, local=learner.placement.part)
    if job.session.world.is_main:
        retention.set_aside(paths, after=saved.state.step)
    job.session.world.barrier()
    kept = {PASSED: {"rollbacks": rollback.number, "positions": [list(each) for each in rollback.passed]}}
    return replace(saved.state, extra={**saved.state.extra, **kept})


def _last_good(paths: RunPaths, first_bad: int) -> Path | None:
    """The newest intact checkpoint of before the step that preceded `first_bad`, or else of before `first_bad`."""
    before = [(step, folder) for step, folder in reversed(paths.checkpoints()) if step < first_bad]
    wanted = sorted(before, key=lambda each: each[0] > first_bad - 2)  # keeps the newest first in both halves
    return next((folder for _, folder in wanted if not manifest.verify(folder)), None)


def _steps_to_pass(streak: Streak, *, after: int) -> list[tuple[int, int]]:
    steps = [*((streak.before,) if streak.before is not None else ()), *streak.steps]
    return [positions for step, positions in steps if step > after]


def _rows(job: Job, steps: Sequence[tuple[int, int]], passed: Ranges) -> list[int]:
    """The rows of the source that the steps consumed while `passed` was passed over."""
    order, seed = replace(job.data.prepared.order, passed=passed), job.config.training.seed
    return [row for begin, end in steps for row in order.rows_at(np.arange(begin, end, dtype=np.int64), seed=seed).tolist()]


def _step_of(folder: Path) -> int:
    return manifest.read(folder).step
