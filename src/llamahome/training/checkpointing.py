"""The checkpoints of a run as the loop sees them: saved in the loop, or in the background with at most one save under way.

A save during training that fails is reported and tried again when the next one is due. The loop waits for the last save, whose failure is
an error. Everything is reported in the thread of the loop.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from llamahome.checkpoint.state import TrainerState
from llamahome.errors import CheckpointError
from llamahome.monitoring.progress import Progress
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.throughput import PartClock

Save = Callable[[TrainerState], Path]
"""Commits a checkpoint and retires old ones; returns at once when the checkpoint of this step is there already."""
ReportSave = Callable[[], Path]
"""Records that a checkpoint was committed, and returns its folder; called in the loop's thread."""
SaveAsync = Callable[[TrainerState], "Future[ReportSave] | None"]
"""Begins to commit a checkpoint of this moment when the one before is done; None where only `Save` is possible. Raises CheckpointError."""


@dataclass(frozen=True)
class _PendingSave:
    """A checkpoint that is being written."""

    step: int
    report: "Future[ReportSave]"


class Checkpointing:
    """Begins saves and reports how they ended; leaving the block waits for the one under way."""

    def __init__(self, save: Save, save_async: SaveAsync, *, recorder: Recorder, progress: Progress, clock: PartClock) -> None:
        self._save, self._save_async = save, save_async
        self._recorder, self._progress, self._clock = recorder, progress, clock
        self._pending: _PendingSave | None = None

    def __enter__(self) -> "Checkpointing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.poll(wait=True)

    def poll(self, *, wait: bool = False) -> None:
        """Report the save under way if it has ended; with `wait`, wait for its end. Raises its error unless the save merely failed."""
        pending = self._pending
        if pending is None or not (wait or pending.report.done()):
            return
        with self._clock.part("save"):
            self._pending = None
            try:
                path = pending.report.result()()
            except CheckpointError as error:
                self._report_failure(pending.step, error)
                return
        self._progress.saved(pending.step, path)

    def begin(self, state: TrainerState) -> None:
        """Save during training, in the background where that is possible."""
        self.poll(wait=True)
        try:
            with self._clock.part("save"):
                report = self._save_async(state)
            if report is not None:
                self._pending = _PendingSave(state.step, report)
            else:
                self._save_now(state)
        except CheckpointError as error:
            self._report_failure(state.step, error)

    def last(self, state: TrainerState) -> Path:
        """Save at the end; the checkpoint is on disk when this returns. Raises CheckpointError."""
        self.poll(wait=True)
        return self._save_now(state)

    def _save_now(self, state: TrainerState) -> Path:
        with self._clock.part("save"):
            path = self._save(state)
        self._progress.saved(state.step, path)
        return path

    def _report_failure(self, step: int, error: CheckpointError) -> None:
        self._recorder.event("save-failed", step=step, message=str(error))
        self._progress.warn(error.problems[0].message, "training goes on; the checkpoint before this one is untouched")
