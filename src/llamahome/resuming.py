"""What a resumed run does differently: which settings changed, and how that changes the learning rate; and the command that resumes a run.

The state of every checkpoint holds the curve of the learning rate, so a resumed run follows it whatever was changed before.
"""

import math
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from llamahome.checkpoint.chosen import same_for_all
from llamahome.checkpoint.state import TrainerState
from llamahome.checkpoint.store import Saved
from llamahome.config.describe import settings
from llamahome.config.initial import FROM_WEIGHTS
from llamahome.config.load import LoadedConfig
from llamahome.config.yamltext import write_value
from llamahome.copied_run import original_of
from llamahome.data.steps.order import Ranges, joined
from llamahome.distributed.failures import run_to_go_on
from llamahome.errors import CheckpointError, ConfigError, Problem
from llamahome.known_runs import to_type
from llamahome.monitoring.in_use import claimed, require_idle
from llamahome.monitoring.progress import Progress
from llamahome.rundir import RunPaths, as_typed, open_run
from llamahome.session import Session
from llamahome.training.run import Outcome, Plan, make_plan, max_seconds
from llamahome.training.schedule import Curve, planned_curve, resumed_curve, time_limit_line
from llamahome.units import Interval

PASSED = "passed_over"
"""Key in TrainerState.extra of what a run passes over since it went back to a checkpoint."""
_OF_WEIGHTS = {
    "training.method": "what it trained are other weights",
    "model.new_tokens": "what it trained has the rows of the tokens that this setting added",
    **dict.fromkeys(
        ("lora.rank", "lora.rank_pattern", "lora.target_modules", "lora.layers", "lora.modules_to_save", "lora.use_dora", "lora.use_vera"),
        "its adapter has weights of the shapes that this setting made",
    ),
    **dict.fromkeys(("lora.alpha", "lora.alpha_pattern", "lora.use_rslora"), "what its adapter has learned would act at another strength"),
    "lora.init": "one of the two starts from factors of the base and subtracts them from it",
}
"""Settings that belong to the weights of a checkpoint, and why."""
_OF_TOKENS = ("model.name", "model.chat_template", "model.new_tokens", "model.eos_token", "model.system_role")
"""Settings of the model that may change the tokens of a row."""
_SHOWN_ROWS = 64
_CURVE = "schedule"
"""Key of the curve in TrainerState.extra."""
_LOW_RATE = 0.1
"""Share of the peak below which steps teach little; a cosine is below it in its last fifth."""


def with_plan(state: TrainerState, loaded: LoadedConfig, plan: Plan) -> TrainerState:
    """The first state of a run, with the learning rate that is planned for it."""
    return _with(state, _planned(loaded, plan.horizon))


def rate_of(state: TrainerState) -> Callable[[int], float]:
    """The learning rate of each update, counted from 0."""
    return Curve(**state.extra[_CURVE]).rate


def agreed(session: Session, own: Saved, *, alone: bool) -> Saved:
    """The checkpoint that all ranks resume, after each has read its `own`; all ranks call it.

    With `alone` no other process may train in the checkpoint's run. Raises CheckpointError checkpoint.in-use, checkpoint.ranks-differ.
    """
    world, problem = session.world, None
    if world.is_main and alone and run_to_go_on() is None:  # a launcher has ended the processes that it starts again
        paths = open_run(own.folder.parent)
        try:
            consequence, hint = "each would remove what the other saves", f"llamahome runs tail {to_type(paths)}"
            session.closing.enter_context(claimed(paths, consequence, hint=hint))
            if original_of(paths) is None:
                require_idle(paths, consequence, hint=hint, waits=session.progress.say)
        except CheckpointError as error:
            problem = asdict(error.problems[0])
    if (refused := world.broadcast_object(problem)) is not None:
        raise CheckpointError(Problem(**refused))
    return same_for_all(world, own, say=session.progress.say)


def changed_settings(saved: LoadedConfig, loaded: LoadedConfig) -> str | None:
    """Every setting that differs from the checkpoint, with both values; None when nothing changed."""
    pairs = [(key, setting.of(saved.config), setting.of(loaded.config)) for key, setting in settings().items()]
    changes = [f"{key} {write_value(old)} -> {write_value(new)}" for key, old, new in pairs if old != new and not key.startswith("output.")]
    return f"changed: {', '.join(changes)}" if changes else None


def refuse_other_adapter(saved: LoadedConfig, loaded: LoadedConfig) -> None:
    """Raise ConfigError if model.adapter was changed, because a resumed run has its own weights."""
    old, new = saved.config.model.adapter, loaded.config.model.adapter
    if old != new:
        message = f"model.adapter was {write_value(old)} at the beginning, {write_value(new)} now; a resumed run has its own weights"
        raise ConfigError(Problem(code="model.adapter-differs", message=message, where=loaded.origins["model.adapter"]))


def refuse_other_objective(saved: LoadedConfig, loaded: LoadedConfig, *, checkpoint: str) -> None:
    """Raise ConfigError if training.objective was changed: rows, losses and the best evaluation mean something else with another one."""
    old, new = saved.config.training.objective, loaded.config.training.objective
    if old != new:
        message = f"training.objective was {old} at the beginning, {new} now; what this run has measured does not compare with another loss"
        begin = "--from-adapter" if loaded.config.training.method == "lora" else "--model"
        hint = f"--set training.objective={old}, or a new run: llamahome train DATA {begin} {checkpoint} --set training.objective={new}"
        raise ConfigError(
            Problem(code="training.objective-differs", message=message, where=loaded.origins["training.objective"], hint=hint)
        )


def refuse_other_state(saved: LoadedConfig, loaded: LoadedConfig, *, allowed: Collection[str], updated: bool) -> None:
    """Raise if the checkpoint's optimizer is another one and has a state, or if the adapter learned beside other numbers of the base.

    `updated` says whether the optimizer has a state; `allowed` are the inputs that may differ, as "base".
    """
    old, new = saved.config.training.optimizer, loaded.config.training.optimizer
    if updated and old != new:
        message = f"training.optimizer was {old} at the beginning, {new} now; the state of one is none for the other"
        where, hint = loaded.origins["training.optimizer"], f"--set training.optimizer={old}"
        raise ConfigError(Problem(code="training.optimizer-differs", message=message, where=where, hint=hint))
    before, now = (write_value(each.config.model.quantization) for each in (saved, loaded))
    if before != now and "base" not in allowed:
        message = f"model.quantization was {before} when the checkpoint was written, {now} now: the adapter learned beside other weights"
        where, hint = loaded.origins["model.quantization"], f"--set model.quantization={before}, or --allow-changed base"
        raise CheckpointError(Problem(code="checkpoint.base-changed", message=message, where=where, hint=hint))


def refuse_other_weights(saved: LoadedConfig, loaded: LoadedConfig) -> None:
    """Raise ConfigError with each changed setting that says which weights are trained, or what the trained ones do in the model."""
    known, problems = settings(), []
    both_lora = loaded.config.training.method == "lora" == saved.config.training.method
    for key in _OF_WEIGHTS if both_lora else ("training.method", "model.new_tokens"):
        old, new = known[key].of(saved.config), known[key].of(loaded.config)
        if old != new and (key != "lora.init" or {old, new} & {*FROM_WEIGHTS}):
            message = f"{key} was {write_value(old)} when the checkpoint was written, {write_value(new)} now; {_OF_WEIGHTS[key]}"
            hint = f"--set {shlex.quote(f'{key}={write_value(old)}')}, or a new run"
            problems.append(Problem(code="training.weights-differ", message=message, where=loaded.origins[key], hint=hint))
    if problems:
        raise ConfigError(problems)


def changed_rows(saved: LoadedConfig, loaded: LoadedConfig) -> str:
    """The changed settings that change the rows that are learned or the tokens they become; "" if none changed."""
    known = {key: setting for key, setting in settings().items() if key.startswith("data.") or key in _OF_TOKENS}
    pairs = [(key, setting.of(saved.config), setting.of(loaded.config)) for key, setting in known.items()]
    return ", ".join(f"{key} {write_value(old)} -> {write_value(new)}" for key, old, new in pairs if old != new)


def with_changes(state: TrainerState, saved: LoadedConfig, loaded: LoadedConfig, plan: Plan, rows: int, progress: Progress) -> TrainerState:
    """The state of a checkpoint with the learning rate that the settings now plan; a change is reported with both rates.

    `saved` are the settings of the checkpoint, `rows` those of an epoch. A checkpoint of a version that saved no curve follows its plan.
    """
    before = make_plan(saved.config.training, rows, step=state.step, consumed=state.consumed)
    old = Curve(**state.extra[_CURVE]) if _CURVE in state.extra else _planned(saved, before.horizon)
    replanned = _planned(loaded, plan.horizon)
    warmup_changed = saved.config.training.warmup != loaded.config.training.warmup
    new = resumed_curve(old, replanned, state.step, on_extend=loaded.config.schedule.on_extend, warmup_changed=warmup_changed)
    for line in _describe_change(state.step, old, new, replanned, loaded):
        progress.say(line)
    _warn_of_other_loss(state, saved, loaded, progress)
    if warmup_changed and new.warmup == old.warmup:
        progress.say(f"training.warmup has no effect any more: the warm-up was over after step {old.warmup:,}")
    if new != old and new.begin == state.step - 1 and new.height < _LOW_RATE and state.step < new.horizon:
        left = new.horizon - state.step
        message = f"the learning rate was at {new.height:.1%} of its peak in step {state.step:,} and keeps falling from there"
        again = "--set schedule.on_extend=replan plans the rate of the longer run from its start"
        progress.warn(message, f"the remaining {left:,} steps teach little; {again}")
    return _with(state, new)


def _warn_of_other_loss(state: TrainerState, saved: LoadedConfig, loaded: LoadedConfig, progress: Progress) -> None:
    """Say so if constants of the objective's loss were changed, because losses before and after then do not compare."""
    old, new = saved.config.preference.model_dump(), loaded.config.preference.model_dump()
    changed = [f"preference.{key}" for key in old if old[key] != new[key]]
    if changed and state.step:
        measured = "answer" if loaded.config.training.objective == "kto" else "pair"
        message = f"{' and '.join(changed)} {'is' if len(changed) == 1 else 'are'} part of the loss and changed after step {state.step:,}"
        consequence = f"losses before and after do not compare, nor does the best evaluation; eval/{measured}_accuracy does"
        progress.warn(message, consequence)


def _describe_change(step: int, old: Curve, new: Curve, replanned: Curve, loaded: LoadedConfig) -> list[str]:
    """How the learning rate changes and why, with the rates of the last step and of the next; nothing when it stays as planned."""
    if step == 0 or step >= new.horizon or (new == old):
        return []
    causes = []
    if new.horizon != old.horizon:
        causes.append(f"the run ends at step {new.horizon:,} instead of {old.horizon:,}")
    if new.peak != old.peak:
        causes.append(f"training.learning_rate is {new.peak:.3g} instead of {old.peak:.3g}")
    if new.shape != old.shape:
        causes.append(f"training.schedule is {new.shape} instead of {old.shape}")
    if new.warmup != old.warmup:
        causes.append(f"the warm-up takes {new.warmup:,} steps instead of {old.warmup:,}")
    how = loaded.config.schedule.on_extend
    rates = f"learning rate {old.rate(step - 1):.2e} in step {step:,}, {new.rate(step):.2e} in step {step + 1:,}"
    other = f"; replan would make it {replanned.rate(step):.2e}" if how == "keep" and new != replanned else ""
    towards = "" if new.shape == "constant" else f", falling to zero at step {new.horizon:,}"
    why = " and ".join(causes) or "the rest is planned again"
    meant = f" (planned was {old.rate(step):.2e})" if step < old.horizon else ""
    return [f"{rates}{meant}: {why}", f"schedule.on_extend {how}{towards}{other}"]


def passed_over(state: TrainerState) -> Ranges:
    """The positions in the data that the run passes over."""
    return joined(state.extra.get(PASSED, {}).get("positions", ()))


def count_rollbacks(state: TrainerState) -> int:
    """How often the run has gone back to a checkpoint."""
    return int(state.extra.get(PASSED, {}).get("rollbacks", 0))


def show_rows(data: Sequence[str], paths: RunPaths, rows: Sequence[int]) -> str:
    """The command that shows these rows of the data as the run reads them."""
    numbers = ",".join(str(row) for row in sorted(set(rows))[:_SHOWN_ROWS])
    return f"llamahome data show {shlex.join(data)} --config {as_typed(paths.config)} --row {numbers}"


def nothing_left(state: TrainerState, plan: Plan, loaded: LoadedConfig) -> str | None:
    """Why a run does not train from `state`; None if it does."""
    if state.step >= plan.horizon:
        return "nothing is left to do"
    limit = max_seconds(loaded.config.training)
    return None if limit is None or state.elapsed_s < limit else f"training.max_time {loaded.config.training.max_time} is over"


def further(paths: RunPaths, loaded: LoadedConfig, state: TrainerState, plan: Plan) -> str:
    """The command that extends a run that has reached its end, where its learning rate is almost zero, or its time is over."""
    training = loaded.config.training
    command = f"llamahome train-resume {as_typed(paths.root)}"
    if state.step < plan.horizon:
        return f"{command} --set training.max_time='{Interval(2 * math.ceil(state.elapsed_s), 'seconds')}'"
    more = f"--max-steps {2 * state.step}" if training.max_steps is not None else f"--epochs {2 * float(training.epochs):g}"
    if training.schedule != "constant" and loaded.config.schedule.on_extend == "keep":
        more += " --set schedule.on_extend=replan"
    return f"{command} {more}"


def cut_short(outcome: Outcome, loaded: LoadedConfig) -> str | None:
    """What it means for the model that training.max_time ended the run before its last step, and what to type; None if it did not."""
    state, training = outcome.state, loaded.config.training
    if outcome.reason != "time is up":
        return None
    return time_limit_line(f"training.max_time {training.max_time} ended it at", Curve(**state.extra[_CURVE]), state.step)


def stopped(outcome: Outcome, plan: Plan, paths: RunPaths) -> Problem:
    """The problem that reports a run that was asked to stop, with the command that resumes it."""
    saved = as_typed(outcome.checkpoint or paths.root)
    message = f"stopped after step {outcome.state.step:,} of {plan.horizon:,}; {saved} is complete"
    return Problem(code="run.stopped", message=message, hint=f"llamahome train-resume {as_typed(paths.root)}")


def _planned(loaded: LoadedConfig, horizon: int) -> Curve:
    training = loaded.config.training
    return planned_curve(peak=float(training.learning_rate), horizon=horizon, warmup=training.warmup, shape=training.schedule)


def _with(state: TrainerState, curve: Curve) -> TrainerState:
    values: dict[str, Any] = asdict(curve)
    return replace(state, extra={**state.extra, _CURVE: values})
