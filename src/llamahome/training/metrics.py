"""The metrics of each step, written once their values are known: the one place in the loop that waits for the device.

Where the device works behind the host, a line is written one line of metrics late, after the next step was given to the device. All
ranks write after the same steps, because all of them stop when a run has diverged.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llamahome.checkpoint.state import TrainerState
from llamahome.data.steps.loader import StepBatch
from llamahome.monitoring.recorder import Window
from llamahome.monitoring.throughput import PartTimes
from llamahome.training.loss_scale import LossScale, Overflowed
from llamahome.training.recovery import BadSteps, Positions
from llamahome.training.run import Run
from llamahome.training.spikes import Limits, Spikes
from llamahome.training.step import StepResult

_MEMORY = "objective"
"""Where TrainerState.extra has what the objective keeps from step to step."""


class StepMetrics:
    """Records every step and writes lines of metrics; counts the steps whose update was refused, and raises Diverged after too many."""

    def __init__(self, run: Run, state: TrainerState) -> None:
        """`state` is where the run begins, with what a checkpoint saved of refused steps and of the losses before it."""
        if run.loss.memory is not None:
            run.loss.memory.restore(state.extra.get(_MEMORY))
        self._run, self._bad = run, BadSteps(run.settings.max_bad_steps, state.bad_steps)
        self._bad.restore(state.extra.get("bad_steps", {"steps": [], "before": None}))
        spikes = Spikes(run.world.device, state.extra.get("spikes")) if run.settings.refuse_spikes else None
        scale = LossScale(state.extra.get("loss_scale")) if run.settings.scales_loss else None
        self.limits = Limits(run.settings.max_grad_norm, spikes, scale)
        """What an update may be, judged by the steps before it."""
        self._closed: list[tuple[Window, PartTimes, list[Positions]]] = []
        """Lines of metrics that are not written yet, oldest first, with the positions of each of their steps."""
        self._positions: list[Positions] = []

    def record(self, step: int, batch: StepBatch, result: StepResult, *, units: Sequence[int], **counts: Any) -> None:
        """Note the results of a step; reads nothing from the device. `counts` are learning_rate, tokens and targets.

        `units` has the number of units over all ranks that the loss and each measured value is a mean of.
        """
        measured = {f"train/{name}": value for name, value in zip(self._run.loss.measured, result.measured, strict=True)}
        recorder, norm = self._run.recorder, result.grad_norm
        recorder.record(step, loss=result.loss, grad_norm=norm, units=units, measured=measured, **counts)
        if self._run.loss.memory is not None and units[0]:
            self._run.loss.memory.note(result.measured)
        self._positions.append((batch.begin, batch.end))
        self._bad.note(step, (batch.begin, batch.end), result.refused)

    def note_overflow(self, step: int, overflowed: Overflowed) -> None:
        """Record that `step` is done again with half the loss scale."""
        old, new = f"{overflowed.scale:,.0f}", f"{overflowed.scale / 2:,.0f}"
        text = f"step {step} is done again: its gradient is too large for float16 with a loss scale of {old}; it is {new} now"
        self._run.recorder.event("loss-scale", step=step, scale=overflowed.scale / 2, text=text)
        self._run.progress.say(text)

    def write_ready(self, state: TrainerState) -> TrainerState:
        """Close the line of metrics of the steps up to this one, and write the lines whose values are on the host."""
        self._close_line(state)
        while self._closed and (len(self._closed) > 1 or not self._closed[0][0].values.late):
            state = self._write_oldest(state)
        return state

    def write_all(self, state: TrainerState) -> TrainerState:
        """Write everything that was recorded; the state gets what a resumed run needs in order to judge steps alike."""
        if self._run.recorder.waits:  # else the clock keeps the time that the next step has spent on its data
            self._close_line(state)
        state = self.write_closed(state)
        judged: dict[str, Any] = {"bad_steps": self._bad.values()}
        if self.limits.spikes is not None:
            judged["spikes"] = self.limits.spikes.values()
        if self.limits.scale is not None:
            judged["loss_scale"] = self.limits.scale.values()
        if self._run.loss.memory is not None:
            judged[_MEMORY] = self._run.loss.memory.values()
        return replace(state, extra={**state.extra, **judged})

    @property
    def may_save(self) -> bool:
        """Whether the last step that was written was applied: a checkpoint between bad steps would replace the one to go back to."""
        return not self._bad.now.steps

    def write_closed(self, state: TrainerState) -> TrainerState:
        """Write each line that is closed; waits for the device."""
        while self._closed:
            state = self._write_oldest(state)
        return state

    def _close_line(self, state: TrainerState) -> None:
        window = self._run.recorder.cut(state.step, self._run.world.traffic.take())
        if window is not None:
            self._bad.cut()
            self._closed.append((window, self._run.clock.cut(), self._positions))
            self._positions = []

    def _write_oldest(self, state: TrainerState) -> TrainerState:
        run, (window, parts, positions) = self._run, self._closed.pop(0)
        metrics = run.recorder.write(window, parts.read(), rows=lambda place: self._rows(positions[place]))
        run.progress.update(window.step, metrics)
        refused = self._bad.read()
        rows: list[str] = []
        for step, bad in refused.items():
            found = self._rows(bad.positions)
            rows = found["rows"]
            run.recorder.event("bad-step", step=step, why=bad.why, **found)
            run.progress.warn(f"step {step}: {bad.why}", "the update was not applied; its rows are in events.jsonl")
        if refused:
            self._bad.raise_if_diverged(rows, run.settings.advice_if_diverged())
        return replace(state, bad_steps=self._bad.total)

    def _rows(self, positions: Positions) -> dict[str, Any]:
        """The rows at these positions and the command that shows them, as fields of an event."""
        numbers = self._run.loader.rows_of(*positions)
        return {"rows": self._run.loader.row_names(numbers), "show": self._run.settings.show_rows(numbers)}
