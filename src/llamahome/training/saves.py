"""The saves of a run as the loop sees them: in the loop, or beside it with at most one under way. What came of each is told in the loop.

A save in mid-run that fails is told and tried again when the next one is due; the last one is waited for, and its failure is an error.
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
"""Commits a checkpoint and retires old ones; saving a step again is no work."""
Tell = Callable[[], Path]
"""Writes down that a checkpoint stands, and returns its folder; belongs to the loop's thread."""
SaveBeside = Callable[[TrainerState], "Future[Tell] | None"]
"""Begins to commit a checkpoint of this moment, once the one before is done; None where only `Save` is possible."""


def never_beside(state: TrainerState) -> "Future[Tell] | None":
    """Every save is waited for."""
    del state
    return None


@dataclass(frozen=True)
class _UnderWay:
    """A checkpoint that is being written."""

    step: int
    told: "Future[Tell]"


class Saves:
    """Begins saves and tells what came of them; leaving the block waits for the one under way."""

    def __init__(self, save: Save, save_beside: SaveBeside, *, recorder: Recorder, progress: Progress, clock: PartClock) -> None:
        self._save, self._save_beside = save, save_beside
        self._recorder, self._progress, self._clock = recorder, progress, clock
        self._under_way: _UnderWay | None = None

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hear(wait=True)

    def hear(self, *, wait: bool = False) -> None:
        """Tell of the save that was under way if it is done, or once it is. What was raised there is raised here, but for a failed save."""
        under_way = self._under_way
        if under_way is None or not (wait or under_way.told.done()):
            return
        with self._clock.part("save"):
            self._under_way = None
            try:
                path = under_way.told.result()()
            except CheckpointError as error:
                self._failed(under_way.step, error)
                return
        self._progress.saved(under_way.step, path)

    def begin(self, state: TrainerState) -> None:
        """Save in mid-run, beside the loop where that is possible."""
        self.hear(wait=True)
        with self._clock.part("save"):
            told = self._save_beside(state)
        if told is not None:
            self._under_way = _UnderWay(state.step, told)
            return
        try:
            self._now(state)
        except CheckpointError as error:
            self._failed(state.step, error)

    def last(self, state: TrainerState) -> Path:
        """Save at the end, on disk when it returns. Raises CheckpointError."""
        self.hear(wait=True)
        return self._now(state)

    def _now(self, state: TrainerState) -> Path:
        with self._clock.part("save"):
            path = self._save(state)
        self._progress.saved(state.step, path)
        return path

    def _failed(self, step: int, error: CheckpointError) -> None:
        self._recorder.event("save-failed", step=step, message=str(error))
        self._progress.warn(error.problems[0].message, "training goes on; the checkpoint before this one is untouched")
