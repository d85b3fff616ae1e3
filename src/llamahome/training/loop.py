"""The training loop: one pass of the `for` is one optimizer step. Between two steps it evaluates, saves, and checks whether to stop.

The loop knows nothing of adapters, precision, sharding or file formats: these are in the parts of a `Run`, which assembly.py makes.
Whatever depends on a clock or a signal is agreed between the ranks in the same exchange that counts the units of the step.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from llamahome.checkpoint.state import TrainerState
from llamahome.data.steps.loader import StepBatch, Steps
from llamahome.monitoring.throughput import PartClock
from llamahome.training.budget import Budget
from llamahome.training.memory import RanOut
from llamahome.training.metrics import StepMetrics
from llamahome.training.optimizer import set_learning_rate
from llamahome.training.run import Outcome, Run, after_evaluation, after_update
from llamahome.training.step import StepResult, step_seed, train_step
from llamahome.training.stop import Reason


def train(run: Run, state: TrainerState) -> Outcome:
    """Train from `state` until the horizon or until there is a reason to stop; all ranks call it."""
    settings, schedule, metrics = run.settings, run.schedule, StepMetrics(run, state)
    update = partial(train_step, run.loss.sums, run.optimizer, limits=metrics.limits, reducer=run.reducer, clock=run.clock)
    budget = Budget(run)
    reason: Reason = "finished"
    started = time.perf_counter()
    with run.checkpoints as checkpoints:
        for batch in _timed(run.loader, run.clock):
            checkpoints.poll()
            agreed = _agree(run, state, batch, short=budget.short is not None, spent=state.elapsed_s + time.perf_counter() - started)
            if agreed.evaluate:
                state = _evaluate(run, metrics.write_closed(state))
            if agreed.save or (agreed.evaluate and settings.saves(state)):
                state = metrics.write_all(state)  # before the checkpoint, because a resumed run does not repeat these steps
                if metrics.may_save:
                    checkpoints.begin(state)
            if stop := _reason_to_stop(run, state, agreed):
                reason = stop
                break

            batch = budget.before_step(batch, step=state.step + 1, short=agreed.short)
            rate = schedule.learning_rate(state.step)
            set_learning_rate(run.optimizer, rate)
            seed = step_seed(settings.seed, state.step)
            while not isinstance(result := update(batch.microbatches, divisors=agreed.units, seed=seed), StepResult):
                if isinstance(result, RanOut):
                    batch = budget.lower(batch, result, step=state.step + 1)
                else:
                    metrics.note_overflow(state.step + 1, result)
            budget.short = result.short

            counts = {"tokens": agreed.tokens, "targets": agreed.targets}
            seconds, started = time.perf_counter() - started, time.perf_counter()
            state = after_update(state, consumed=batch.end, micro_batch_tokens=batch.micro_batch_tokens, seconds=seconds, **counts)
            metrics.record(state.step, batch, result, learning_rate=rate, units=agreed.units, **counts)
            if schedule.log.after(state.step) or state.step in (1, schedule.horizon):
                state = metrics.write_ready(state)

        state = metrics.write_all(replace(state, elapsed_s=state.elapsed_s + time.perf_counter() - started))
        if reason in ("finished", "time is up") and state.eval_loss is None:
            state = _evaluate(run, state)
        return Outcome(state, reason, checkpoints.last(state))


def _timed(loader: Steps, clock: PartClock) -> Iterator[StepBatch]:
    """The items of `loader`; waiting for one counts as data time."""
    while True:
        with clock.part("data"):
            batch = next(loader, None)
        if batch is None:
            return
        yield batch


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know before a step."""

    tokens: int
    targets: int
    units: tuple[int, ...]
    stop: bool
    time_is_up: bool
    evaluate: bool
    save: bool
    short: bool


def _agree(run: Run, state: TrainerState, batch: StepBatch, *, short: bool, spent: float) -> _Agreed:
    """One exchange per step: its tokens, targets and units, whether any rank wants to stop, evaluate or save, or was `short` of memory, and
    what each rank did. Only rank 0's clock counts, on which training has taken `spent` seconds.
    """
    main = run.world.is_main and state.step > 0
    evaluate = main and run.schedule.evaluate.after(state.step) and state.eval_loss is None  # a resumed step was evaluated before
    save = main and run.schedule.save.after(state.step)
    time_is_up = main and run.settings.max_seconds is not None and spent >= run.settings.max_seconds
    units = [sum(each) for each in zip(*map(run.loss.units, batch.microbatches), strict=True)] or [0] * (1 + len(run.loss.measured))
    values = [*units, batch.num_tokens, batch.num_targets, run.stop.asked, time_is_up, evaluate, save, short]
    values += run.recorder.ranks.send()
    counts = torch.tensor(values, dtype=torch.int64)  # on the processor, so that nobody waits for the steps of a GPU
    if run.world.size > 1:
        with run.clock.part("exchange"):
            run.world.sum_(counts)
    summed = counts.tolist()
    tokens, targets, stop, time_is_up, evaluate, save, short, *told = summed[len(units) :]
    run.recorder.ranks.receive(told)
    return _Agreed(tokens, targets, tuple(summed[: len(units)]), stop > 0, time_is_up > 0, evaluate > 0, save > 0, short > 0)


def _reason_to_stop(run: Run, state: TrainerState, agreed: _Agreed) -> Reason | None:
    if agreed.stop:
        return "asked to stop"
    if agreed.time_is_up:
        return "time is up"
    patience = run.settings.early_stop_patience
    return "no gain" if patience is not None and state.evaluations_without_gain >= patience else None


def _evaluate(run: Run, state: TrainerState) -> TrainerState:
    run.progress.evaluating(state.step)
    with run.clock.part("evaluate"):
        evaluation = run.evaluate(state.step)
    run.progress.evaluated(state.step, evaluation.metrics if evaluation is not None else {})
    return state if evaluation is None else after_evaluation(state, evaluation)
