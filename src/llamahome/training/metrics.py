"""The metrics of each step, written once their values are known: the one place in the loop that waits for the device.

Where the device works behind the host, a line is written one line of metrics late, after the next step was given to the device. All
ranks write after the same steps, because all of them stop when a run has diverged.
"""

from dataclasses import replace

from llamahome.checkpoint.state import TrainerState
from llamahome.data.steps.loader import StepBatch
from llamahome.monitoring.recorder import Window
from llamahome.monitoring.throughput import PartTimes
from llamahome.training.recovery import BadSteps
from llamahome.training.run import Run
from llamahome.training.step import StepResult


class StepMetrics:
    """Records every step and writes lines of metrics; counts the steps whose update was refused, and raises Diverged after too many."""

    def __init__(self, run: Run, *, bad_steps: int) -> None:
        """`bad_steps` of the run were refused before."""
        self._run, self._bad = run, BadSteps(run.settings.max_bad_steps, bad_steps)
        self._closed: list[tuple[Window, PartTimes]] = []
        """Lines of metrics that are not written yet, oldest first."""

    def record(self, step: int, batch: StepBatch, result: StepResult, *, learning_rate: float, tokens: int, targets: int) -> None:
        """Note the results of a step; reads nothing from the device."""
        norm = result.grad_norm
        self._run.recorder.record(step, loss=result.loss, grad_norm=norm, learning_rate=learning_rate, tokens=tokens, targets=targets)
        self._bad.note(step, (batch.begin, batch.end), result.refused)

    def write_ready(self, state: TrainerState) -> TrainerState:
        """Close the line of metrics of the steps up to this one, and write the lines whose values are on the host."""
        self._close_line(state)
        while self._closed and (len(self._closed) > 1 or not self._closed[0][0].values.late):
            state = self._write_oldest(state)
        return state

    def write_all(self, state: TrainerState) -> TrainerState:
        """Write everything that was recorded."""
        if self._run.recorder.waits:  # else the clock keeps the time that the next step has spent on its data
            self._close_line(state)
        return self.write_closed(state)

    def write_closed(self, state: TrainerState) -> TrainerState:
        """Write each line that is closed; waits for the device."""
        while self._closed:
            state = self._write_oldest(state)
        return state

    def _close_line(self, state: TrainerState) -> None:
        window = self._run.recorder.cut(state.step, self._run.world.traffic.take())
        if window is not None:
            self._bad.cut()
            self._closed.append((window, self._run.clock.cut()))

    def _write_oldest(self, state: TrainerState) -> TrainerState:
        run, (window, parts) = self._run, self._closed.pop(0)
        run.progress.update(window.step, run.recorder.write(window, parts.read()))
        refused = self._bad.read()
        rows: list[str] = []
        for step, positions in refused.items():
            rows = run.loader.row_names(*positions)
            run.recorder.event("bad-step", step=step, rows=rows)
            run.progress.warn(f"step {step}: loss or gradient is not finite", "the update was not applied; its rows are in events.jsonl")
        if refused:
            self._bad.raise_if_diverged(rows, run.settings.advice_if_diverged())
        return replace(state, bad_steps=self._bad.total)
