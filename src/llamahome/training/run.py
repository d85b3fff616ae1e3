"""What a run is: the plan of its steps, the parts that the loop works with, its state, and how it ends.

assembly.py makes the parts from the settings; a test makes them from a two-layer model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llamahome.checkpoint.state import TrainerState
from llamahome.config.schema import TrainingConfig, interval
from llamahome.data.records import Microbatch
from llamahome.data.steps.loader import Extent, Steps
from llamahome.distributed.reducer import Reducer
from llamahome.distributed.world import World
from llamahome.monitoring.progress import Progress
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.throughput import PartClock
from llamahome.training.checkpointing import Checkpointing
from llamahome.training.evaluate import Evaluation
from llamahome.training.memory import USUAL, Remedies
from llamahome.training.objective import Memory, targets_only
from llamahome.training.schedule import Due
from llamahome.training.stop import Reason, StopRequest


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes over how many rows."""

    horizon: int
    """Planned number of updates."""
    positions: int
    """Rows that the whole run consumes."""
    steps_per_epoch: float
    rows_ahead: int
    """Rows that are still to be trained on."""


def make_plan(training: TrainingConfig, rows: int, *, step: int = 0, consumed: int = 0) -> Plan:
    """The plan of a run with `rows` in an epoch, after `step` updates over `consumed` rows; epochs and batch_size must be numbers.

    What is done counts as it was done, so a resumed run with another batch size still ends at max_steps or after its epochs.
    """
    epochs, batch = float(training.epochs), int(training.batch_size)
    extent = Extent(epochs=epochs, batch_size=batch, max_steps=training.max_steps, step=step, consumed=consumed)
    positions = extent.positions(rows)
    return Plan(extent.horizon(rows), positions, rows / batch, max(0, positions - consumed))


def max_seconds(training: TrainingConfig) -> float | None:
    """training.max_time in seconds; None without a limit."""
    return None if training.max_time is None else interval(training.max_time).value


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What happens at which step."""

    horizon: int
    learning_rate: Callable[[int], float]
    """Learning rate of an update, counted from 0."""
    log: Due
    evaluate: Due
    save: Due


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """The settings that the loop itself reads."""

    seed: int
    max_grad_norm: float | None
    max_bad_steps: int
    early_stop_patience: int | None
    """Evaluations without a better value of the metric after which the run stops."""
    save_best: bool
    """Whether every new best evaluation is saved."""
    advice_if_diverged: Callable[[], str]
    """What to type after the run has diverged."""
    max_seconds: float | None = None
    """Training time after which the run ends, that of earlier processes included."""
    refuse_spikes: bool = True
    """Whether updates are refused whose loss or gradient leaps far above the steps before."""
    scales_loss: bool = False
    """Whether gradients are float16, and losses are scaled for them."""
    show_rows: Callable[[Sequence[int]], str] = lambda rows: ""
    """The command that shows rows of the data by their numbers."""
    remedies: Remedies = USUAL
    """What takes less memory where nothing can be done again."""
    retry_memory_after: int = 100
    """Steps after which larger micro-batches are tried again once memory ran out; twice as many each time that they fail, because a
    failed try costs a part of one step."""
    final_is_best: bool = False
    """Whether the best step of training is saved even if the untrained model was better, because it becomes the final model."""

    def saves(self, state: TrainerState) -> bool:
        """Whether the evaluation of `state` is one whose checkpoint is kept as the best."""
        best = state.extra.get("judged", {}).get("trained_step") if self.final_is_best else state.best_step
        return self.save_best and best == state.step


@dataclass(frozen=True)
class StepLoss:
    """What a step minimises, as the objective of the run gives it."""

    sums: Callable[[Microbatch], Tensor]
    """Summed loss of a micro-batch, () or [1 + measured]: the sums of what is measured behind it."""
    units: Callable[[Microbatch], tuple[int, ...]] = targets_only
    """How many units each of these sums is over; the sums of a step are divided by the units of all its micro-batches."""
    measured: tuple[str, ...] = ()
    """Names of what is measured in a step besides the loss."""
    memory: Memory | None = None
    """What the loss of a step depends on besides its rows and the weights."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop works with, grouped by the part of the program that owns it."""

    # model
    loss: StepLoss
    optimizer: torch.optim.Optimizer
    reducer: Reducer
    """Sums gradients over all ranks."""
    # data
    loader: Steps
    # training
    schedule: Schedule
    settings: LoopSettings
    evaluate: Callable[[int], Evaluation | None]
    """Evaluates after that many updates and records the result; None without held-out rows."""
    checkpoints: Checkpointing
    # monitoring
    recorder: Recorder
    progress: Progress
    clock: PartClock
    # the command
    stop: StopRequest

    @property
    def world(self) -> World:
        """The ranks that train together."""
        return self.reducer.world


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: TrainerState
    reason: Reason
    checkpoint: Path | None


def first_state(micro_batch_tokens: int) -> TrainerState:
    """Before the first update."""
    return TrainerState(
        step=0,
        consumed=0,
        tokens=0,
        targets=0,
        bad_steps=0,
        best_loss=None,
        best_step=None,
        evaluations_without_gain=0,
        elapsed_s=0.0,
        micro_batch_tokens=micro_batch_tokens,
    )


def after_update(state: TrainerState, *, consumed: int, tokens: int, targets: int, micro_batch_tokens: int, seconds: float) -> TrainerState:
    """One more step; `consumed` is the new position in the data, `tokens` and `targets` are those of the step over all ranks."""
    return replace(
        state,
        step=state.step + 1,
        consumed=consumed,
        tokens=state.tokens + tokens,
        targets=state.targets + targets,
        elapsed_s=state.elapsed_s + seconds,
        micro_batch_tokens=micro_batch_tokens,
        eval_loss=None,
    )


def after_evaluation(state: TrainerState, evaluation: Evaluation) -> TrainerState:
    """Remember the evaluation at this step and whether it is the best so far; a value that is not finite counts as no gain.

    Where the metric is another than at the evaluation before, the search for the best begins again.
    """
    judged = dict(state.extra.get("judged") or {"metric": "loss", "best": state.best_loss, "evaluations": 0, "trained_step": None})
    if judged["metric"] != evaluation.metric:
        judged = {"metric": evaluation.metric, "best": None, "evaluations": 0, "trained_step": None}
        state = replace(state, best_loss=None, best_step=None, evaluations_without_gain=0)
    value, finite = evaluation.value, math.isfinite(evaluation.loss) and math.isfinite(evaluation.value)
    judged["evaluations"] += 1
    if not finite:
        extra = {**state.extra, "judged": judged}
        return replace(state, eval_loss=None, evaluations_without_gain=state.evaluations_without_gain + 1, extra=extra)
    judged |= {"value": value, "step": state.step}
    if state.step and (judged["trained_step"] is None or evaluation.better(judged["trained_best"])):
        judged |= {"trained_step": state.step, "trained_best": value}
    gain = judged["best"] is None or evaluation.better(judged["best"])
    if gain:
        judged["best"] = value
        state = replace(state, best_loss=evaluation.loss, best_step=state.step)
    without = 0 if gain else state.evaluations_without_gain + 1
    return replace(state, eval_loss=evaluation.loss, evaluations_without_gain=without, extra={**state.extra, "judged": judged})
