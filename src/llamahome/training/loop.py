"""The loop: one pass through the `for` is one optimizer step. Between two steps it evaluates, saves and asks why to stop.

It knows nothing of adapters, precision, sharding or file formats: all of that is in the parts of a `Run`, which pipeline.py puts together.
Whatever depends on a clock or a signal is agreed between the ranks in the same exchange that counts the targets of the step.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llamahome.checkpoint.state import TrainerState
from llamahome.data.records import Microbatch
from llamahome.data.steps.loader import Loader
from llamahome.distributed.exchange import Exchange
from llamahome.distributed.roll import processes
from llamahome.distributed.world import World
from llamahome.monitoring.progress import Progress
from llamahome.monitoring.recorder import Recorder, Window
from llamahome.monitoring.throughput import PartClock, Parts
from llamahome.training.evaluate import Evaluation
from llamahome.training.optimizer import set_learning_rate
from llamahome.training.recovery import BadSteps, exhausted, give_back_memory, smaller_budget, update_does_not_fit
from llamahome.training.saves import Save, SaveBeside, Saves, never_beside
from llamahome.training.schedule import Due
from llamahome.training.state import after_evaluation, after_update
from llamahome.training.step import StepResult, dropout_seed, train_step
from llamahome.training.stop import Reason, StopRequest


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers that a run obeys."""

    horizon: int
    """Planned number of updates."""
    batch_size: int
    positions: int
    """Examples that the whole run consumes."""
    seed: int
    max_grad_norm: float | None
    max_bad_steps: int
    patience: int | None
    keeps_best: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one training run is made of."""

    objective: Callable[[Microbatch], Tensor]
    """Summed loss of a micro-batch."""
    optimizer: torch.optim.Optimizer
    loader: Loader
    """One item is this rank's share of one step."""
    rate: Callable[[int], float]
    """Learning rate of an update, counted from 0."""
    evaluate: Callable[[int], Evaluation | None]
    """Evaluate after that many updates, write it down; None without held-out rows."""
    save: Save
    rows_at: Callable[[int, int], list[str]]
    """Names of the rows at positions from, to: for what has to be said about a step."""
    go_on: Callable[[], str]
    """What to type after this run has diverged."""
    recorder: Recorder
    progress: Progress
    clock: PartClock
    world: World
    exchange: Exchange
    """Of gradients."""
    stop: StopRequest
    limits: Limits
    log_due: Due
    evaluate_due: Due
    save_due: Due
    save_beside: SaveBeside = never_beside


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: TrainerState
    reason: Reason
    checkpoint: Path | None


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know before a step."""

    tokens: int
    targets: int
    stop: bool
    evaluate: bool
    save: bool


def train(run: Run, state: TrainerState) -> Outcome:
    """Train from `state` until the horizon or another reason; all ranks call it."""
    with Saves(run.save, run.save_beside, recorder=run.recorder, progress=run.progress, clock=run.clock) as saves:
        return _train(run, state, saves)


def _train(run: Run, state: TrainerState, saves: Saves) -> Outcome:
    limits, notes = run.limits, _Notes(run, BadSteps(run.limits.max_bad_steps, state.bad_steps))
    reason: Reason = "finished"
    for microbatches in _timed(run.loader, run.clock):
        started = time.perf_counter()
        saves.hear()
        agreed = _agree(run, state, microbatches)
        if agreed.evaluate:
            state = _evaluate(run, notes.write_closed(state))
        if agreed.save or (limits.keeps_best and agreed.evaluate and state.best_step == state.step):
            state = notes.write_all(state)  # what a resumed run does not repeat must be on disk before the checkpoint
            saves.begin(state)
        if found := _reason_to_stop(state, agreed, limits.patience):
            reason = found
            break
        rate = run.rate(state.step)
        set_learning_rate(run.optimizer, rate)
        state, result = _step(run, state, microbatches, targets=agreed.targets)
        begin, consumed = state.consumed, min(limits.positions, state.consumed + limits.batch_size)
        seconds = time.perf_counter() - started
        state = after_update(state, consumed=consumed, tokens=agreed.tokens, targets=agreed.targets, seconds=seconds)
        run.recorder.record(
            state.step, loss=result.loss, grad_norm=result.grad_norm, learning_rate=rate, tokens=agreed.tokens, targets=agreed.targets
        )
        notes.bad.note(state.step, (begin, consumed), result.refused)
        if run.log_due.after(state.step) or state.step in (1, limits.horizon):
            state = notes.write_known(state)
    state = notes.write_all(state)
    if reason == "finished" and state.eval_loss is None:
        state = _evaluate(run, state)
    return Outcome(state, reason, saves.last(state))


def _step(run: Run, state: TrainerState, microbatches: Sequence[Microbatch], *, targets: int) -> tuple[TrainerState, StepResult]:
    """One update; when memory runs out on any process, all lay the same examples out in smaller micro-batches, and that stays so."""
    while True:
        try:
            found = train_step(
                run.objective,
                run.optimizer,
                microbatches,
                num_targets=targets,
                seeds=[dropout_seed(run.limits.seed, state.step, microbatch.index) for microbatch in microbatches],
                max_grad_norm=run.limits.max_grad_norm,
                exchange=run.exchange,
                clock=run.clock,
            )
        except (MemoryError, RuntimeError) as error:
            if exhausted(error):
                raise update_does_not_fit(error, world=run.world) from error
            raise
        if isinstance(found, StepResult):
            return state, found
        lengths, wait = [microbatch.lengths for microbatch in microbatches], run.exchange.passes_wait
        smaller = smaller_budget(found.told, state.micro_batch_tokens, lengths, world=run.world, others_wait=wait)
        budget = smaller.micro_batch_tokens
        give_back_memory()
        run.loader.set_micro_batch_tokens(budget)
        microbatches = run.loader.again()
        run.recorder.event("out-of-memory", step=state.step + 1, micro_batch_tokens=budget, processes=smaller.ran_out)
        on = f" on {processes(smaller.ran_out)}" if run.world.size > 1 else ""
        told = f"step {state.step + 1}: memory ran out{on} with up to {state.micro_batch_tokens:,} tokens at a time"
        run.progress.warn(told, f"it is done again with {budget:,}, and so are the steps to come; the result stays the same")
        state = replace(state, micro_batch_tokens=budget)


def _timed(loader: Iterable[Sequence[Microbatch]], clock: PartClock) -> Iterator[Sequence[Microbatch]]:
    """The items of `loader`; waiting for one counts as data time."""
    items = iter(loader)
    while True:
        with clock.part("data"):
            item = next(items, None)
        if item is None:
            return
        yield item


def _agree(run: Run, state: TrainerState, microbatches: Sequence[Microbatch]) -> _Agreed:
    """One exchange per step: its tokens and targets, and whether anybody wants to stop, evaluate or save. Only rank 0's clock counts."""
    tokens, targets = sum(m.num_tokens for m in microbatches), sum(m.num_targets for m in microbatches)
    main = run.world.is_main and state.step > 0
    evaluate = main and run.evaluate_due.after(state.step) and state.eval_loss is None  # a resumed step was evaluated before
    save = main and run.save_due.after(state.step)
    counts = torch.tensor(
        [tokens, targets, run.stop.asked, evaluate, save], dtype=torch.int64
    )  # not on a GPU, whose steps nobody waits for
    if run.world.size > 1:
        with run.clock.part("exchange"):
            run.world.sum_(counts)
    tokens, targets, stop, evaluate, save = counts.tolist()
    return _Agreed(tokens, targets, stop > 0, evaluate > 0, save > 0)


def _reason_to_stop(state: TrainerState, agreed: _Agreed, patience: int | None) -> Reason | None:
    if agreed.stop:
        return "asked to stop"
    return "no gain" if patience is not None and state.evaluations_without_gain >= patience else None


def _evaluate(run: Run, state: TrainerState) -> TrainerState:
    run.progress.evaluating(state.step)
    with run.clock.part("evaluate"):
        found = run.evaluate(state.step)
    run.progress.evaluated(state.step, found.metrics if found is not None else {})
    return state if found is None else after_evaluation(state, found)


class _Notes:
    """What was measured of the steps, written down when it is known: the one place in the loop that waits for the device.

    Where the device works behind the host, that is one line of metrics late, after the next step was given to the device. All ranks
    write after the same steps, for all of them stop when a run has diverged.
    """

    def __init__(self, run: Run, bad: BadSteps) -> None:
        self._run, self.bad = run, bad
        self._unwritten: list[tuple[Window, Parts]] = []

    def write_known(self, state: TrainerState) -> TrainerState:
        """Close the line of metrics of the steps up to this one; write those whose values are on the host."""
        self._cut(state)
        while self._unwritten and (len(self._unwritten) > 1 or not self._unwritten[0][0].values.late):
            state = self._write(state)
        return state

    def write_all(self, state: TrainerState) -> TrainerState:
        """Write all that was recorded."""
        if self._run.recorder.waits:  # else the clock keeps what the next step has spent on its data
            self._cut(state)
        return self.write_closed(state)

    def write_closed(self, state: TrainerState) -> TrainerState:
        """Write each line that is closed; waits for the device."""
        while self._unwritten:
            state = self._write(state)
        return state

    def _cut(self, state: TrainerState) -> None:
        window = self._run.recorder.cut(state.step, self._run.world.traffic.take())
        if window is not None:
            self.bad.cut()
            self._unwritten.append((window, self._run.clock.cut()))

    def _write(self, state: TrainerState) -> TrainerState:
        run, (window, parts) = self._run, self._unwritten.pop(0)
        run.progress.update(window.step, run.recorder.write(window, parts.read()))
        refused = self.bad.read()
        rows: list[str] = []
        for step, positions in refused.items():
            rows = run.rows_at(*positions)
            run.recorder.event("bad-step", step=step, rows=rows)
            run.progress.warn(f"step {step}: loss or gradient is not finite", "the update was not applied; its rows are in events.jsonl")
        if refused:
            self.bad.raise_if_diverged(rows, run.go_on())
        return replace(state, bad_steps=self.bad.total)
