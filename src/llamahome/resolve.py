"""The one place where settings that are `auto` become numbers: after the rows are read and the base is loaded. Then they are frozen.

Each rule returns the settings that it resolves, with a value and a reason each. `resolve_settings` applies all rules and writes the
reasons down as origins, so that a resumed run has the same numbers. All ranks get the same values. The figures behind the rules are in
training/auto.py, model/place.py and the back ends.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.config.load import AUTO, LoadedConfig, is_chosen, with_values
from llamahome.config.schema import Config, TrainingConfig, interval
from llamahome.data.content import Content
from llamahome.data.prepare import Prepared
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, Problem
from llamahome.model.backends.backend import Backend
from llamahome.model.packing import packing_of
from llamahome.model.place import count_weights
from llamahome.model.stream import stream_of
from llamahome.pass_memory import Resolved, Say, resolve_memory
from llamahome.streamed import resolve_streamed, without_answers
from llamahome.training.answer_metric import ANSWERED_ROWS, FROM_TARGETS, AnswerMetric, answer_room, open_answer_metric
from llamahome.training.auto import ONE_PASS, auto_batch_size, auto_epochs, auto_learning_rate, plan_evaluations, rate_factors
from llamahome.training.evaluate import ANSWER_TOKENS
from llamahome.training.loaded_model import BaseModel
from llamahome.training.run import Plan, make_plan
from llamahome.units import many

_ABOUT_A_TENTH = 0.12
"""Largest share of the time of training that the message calls a tenth."""
PASSES_PER_TOKEN = {"lora": 2.0, "full": 3.0}
"""Forward passes that a trained token costs: a forward pass, the gradient of the input and, where all weights are trained, theirs."""


def resolve_settings(
    loaded: LoadedConfig, prepared: Prepared, base: BaseModel, world: World, *, step: int = 0, consumed: int = 0, say: Say
) -> tuple[LoadedConfig, Plan]:
    """The settings without `auto`, and the plan of the run, of which `step` updates over `consumed` rows are done."""
    stream = stream_of(base.model)
    if stream is not None:
        loaded = with_resolved(loaded, without_answers(loaded, say=say))
    counted = with_resolved(loaded, resolve_amount(loaded.config.training, prepared, processes=world.size, say=say))
    plan = make_plan(counted.config.training, prepared.order.epoch_rows, step=step, consumed=consumed)
    tokens = plan.rows_ahead * prepared.report.tokens_per_row
    compiling, compiled = _resolve_compile(loaded.config.training, base, world, tokens=tokens, say=say)
    evaluation = resolve_evaluation(loaded, prepared, plan, base.backend, say=say)
    if stream is None:
        memory = resolve_memory(loaded.config, base, world, longest=prepared.report.longest_tokens, compiled=compiled, say=say)
    else:
        memory = resolve_streamed(counted.config, base, stream, world, report=prepared.report, compiled=compiled, say=say)
    return with_resolved(counted, compiling | _resolve_model(loaded.config, base) | memory | evaluation), plan


def with_resolved(loaded: LoadedConfig, resolved: Resolved) -> LoadedConfig:
    """The settings with the resolved values, and the reasons as their origins."""
    for key, (value, reason) in resolved.items():
        loaded = with_values(loaded, {key: value}, origin=f"{AUTO}{reason}")
    return loaded


def resolve_amount(training: TrainingConfig, prepared: Prepared, *, processes: int = 1, say: Say) -> Resolved:
    """training.epochs and training.batch_size; `say` gets one line with the numbers and the reason.

    The figures come from the same rows whether these are streamed or not.
    """
    if training.epochs != "auto" and training.batch_size != "auto":
        return {}
    rows = prepared.order.epoch_rows
    epochs, batch, why = _amount(training, rows, prepared.content())
    values = {"training.epochs": epochs, "training.batch_size": batch}
    resolved = {key: (value, why) for key, value in values.items() if getattr(training, key.partition(".")[2]) == "auto"}
    only = "" if len(resolved) == 2 else f" ({next(iter(resolved))} is auto)"
    say(f"{_describe_amount(rows, epochs, batch, training.max_steps)}, because {why}{only}")
    if batch < processes and "training.batch_size" in resolved:
        idle = f"{processes - batch} of {processes} processes have nothing to do in each step"
        say(f"{idle}; --set training.batch_size={processes} gives each of them a row")
    return resolved


def _amount(training: TrainingConfig, rows: int, content: Content) -> tuple[float, int, str]:
    """Passes that the run comes to, rows per step, and why: what the user set stays, and the other adapts to it."""
    epochs = training.epochs if training.max_steps is None else "auto"
    automatic = auto_batch_size(rows) if epochs == "auto" else auto_batch_size(rows, epochs=epochs)
    batch = automatic if training.batch_size == "auto" else training.batch_size
    if training.max_steps is not None:
        return training.max_steps * batch / rows, batch, f"training.max_steps is {training.max_steps:,}"
    if epochs != "auto":
        return epochs, batch, f"there are {many(rows, 'row')}"
    if training.objective in ONE_PASS:
        return 1, batch, ONE_PASS[training.objective]
    why = f"there are {many(rows, 'row')} with about {content.targets:,.0f} tokens to learn in each"
    why += f", {content.own:.0%} of them in no other answer"
    return auto_epochs(rows, content.targets, content.own, batch_size=batch), batch, why


def _describe_amount(rows: int, epochs: float, batch: int, max_steps: int | None) -> str:
    """`5 rows: 12 passes, 15 steps of 4 rows`."""
    steps = max_steps or max(1, math.ceil(round(epochs * rows, 6) / batch))
    passes = "1 pass" if epochs == 1 else f"{epochs:.3g} passes"
    return f"{many(rows, 'row')}: {passes}, {many(steps, 'step')} of {many(batch, 'row')}"


def too_short_to_compile(training: TrainingConfig, base: Path, backend: Backend, world: World, *, tokens: float, say: Say) -> Resolved:
    """training.compile false where it is auto, a rank would have to compile, and training on `tokens` does not win back that time."""
    if training.compile != "auto":
        return {}
    worth = backend.compile_pays_off(tokens, weights=count_weights(base), processes=world.size)
    if not world.max(not worth):
        return {}
    why = f"{round(tokens):,} tokens are too few to win back the time of compiling"
    say(f"training.compile: {why}; it trains without")
    return {"training.compile": (False, why)}


def refuse_to_compile(training: TrainingConfig, backend: Backend) -> None:
    """Raise ConfigError if training.compile is true and the back end has nothing to compile."""
    if training.compile is True and not backend.compiles:
        message = f"the {backend.name} back end has nothing to compile"
        hint = "--set training.compile=auto"
        raise ConfigError(Problem(code="training.nothing-to-compile", message=message, where="training.compile", hint=hint))


def _resolve_compile(training: TrainingConfig, base: BaseModel, world: World, *, tokens: float, say: Say) -> tuple[Resolved, bool]:
    """training.compile, the same on all ranks, and whether the estimate of memory may count on it."""
    backend, replicated = base.backend, base.strategy.strategy == "replicate"
    if training.compile is False:
        return {}, False
    refuse_to_compile(training, backend)
    if replicated and (short := too_short_to_compile(training, base.folder, backend, world, tokens=tokens, say=say)):
        return short, False
    alone = "documents run one at a time" if packing_of(base.model).why_alone is not None else None
    why = alone or (backend.cannot_compile() if replicated else "the weights are sharded")
    if world.max(why is not None):
        why = why or "another process cannot"
        if backend.compiles:
            say(f"training.compile: {why}; it trains without")
        return {"training.compile": (False, why)}, False
    resolved = {"training.compile": (True, f"the {backend.name} back end compiles parts of the model")}
    return resolved if training.compile == "auto" else {}, True


def _resolve_model(config: Config, base: BaseModel) -> Resolved:
    """What method and model decide: strategy, learning rate and types of numbers."""
    method, precision = config.training.method, base.backend.precision
    resolved: Resolved = {}
    if config.distributed.strategy == "auto":
        resolved["distributed.strategy"] = base.strategy.strategy, base.strategy.reason
    if config.training.learning_rate == "auto":
        width = base.model.get_output_embeddings().weight.shape[1]
        factors = rate_factors(config)
        less = "".join(f", {factor:g} times that with {name}" for name, factor in factors.items())
        rate = auto_learning_rate(method, width, *factors.values())
        resolved["training.learning_rate"] = rate, f"{method} at hidden size {width}{less}"
    if config.model.dtype == "auto":
        resolved["model.dtype"] = str(precision.storage).removeprefix("torch."), f"method {method}, {precision.reason}"
    if config.training.mixed_precision == "auto":
        resolved["training.mixed_precision"] = precision.name, precision.reason
    return resolved


def resolve_evaluation(loaded: LoadedConfig, prepared: Prepared, plan: Plan, backend: Backend, *, say: Say) -> Resolved:
    """evaluation.rows and evaluation.every, so that all evaluations take about a tenth of the time of training."""
    evaluation, method = loaded.config.evaluation, loaded.config.training.method
    rows, every = evaluation.rows, evaluation.every
    if rows == "auto" and plan.rows_ahead < plan.positions and not is_chosen(loaded.origins["evaluation.rows"]):
        rows = "all"  # resumes a run of an earlier version, which evaluated all
    tokens, resolved = held_out_tokens(prepared), Resolved()
    if not len(tokens) and evaluation.metric != "loss":
        say(f"warning: evaluation.metric {evaluation.metric} has no effect, because no rows are held out")
    planned = plan_evaluations(
        tokens,
        work=PASSES_PER_TOKEN[method] * plan.positions * prepared.report.tokens_per_row,
        answers=_answer_cost(loaded.config, prepared, backend, say=say),
        horizon=plan.horizon,
        steps_per_epoch=plan.steps_per_epoch,
        rows=len(tokens) if rows == "all" else rows,
        every=None if every == "auto" else interval(every),
    )
    if every == "auto":
        resolved["evaluation.every"] = str(planned.every), "at most a tenth of the work"
    if evaluation.rows == "auto" and planned.rows == len(tokens) > 0:
        resolved["evaluation.rows"] = "all", "all"
    elif evaluation.rows == "auto" and len(tokens):
        cost = "so that evaluating takes about a tenth of the time of training"
        if planned.share > _ABOUT_A_TENTH:
            cost = f"no fewer, although evaluating takes {planned.share:.0%} of the time of training"
        resolved["evaluation.rows"] = planned.rows, f"of {len(tokens):,}, {cost}"
        chosen = f"evaluation: {planned.rows:,} of {len(tokens):,} held-out rows, chosen by content"
        say(f"{chosen}, {cost}; --set evaluation.rows=all evaluates all")
    return resolved


def _answer_cost(config: Config, prepared: Prepared, backend: Backend, *, say: Say) -> float:
    """What the answers of one evaluation cost, in tokens of a forward pass: to sample prompts, and to those of evaluation.metric."""
    each = backend.pass_tokens_per_answer_token
    cost = ANSWER_TOKENS * each if config.evaluation.sample_prompts else 0.0
    table = _answered_rows(prepared, config)
    if config.evaluation.metric in FROM_TARGETS or table is None:
        return cost
    room, rows, prompts = answer_room(table), len(table), float(table.offsets[-1] - table.offsets[0])
    of = f"{rows:,} of {len(held_out_tokens(prepared)):,} held-out rows, always the same, in at most {room} tokens each"
    say(f"evaluation.metric {config.evaluation.metric}: at each evaluation the model answers {of}")
    return cost + prompts + room * (each + rows)


def answers_to_score(prepared: Prepared, config: Config, tokenizer: ChatTokenizer) -> AnswerMetric | None:
    """What scores answers to held-out rows; None if evaluation.metric needs no answers. Raises ConfigError if no row has an answer."""
    metric, answered = open_answer_metric(config.evaluation.metric), _answered_rows(prepared, config)
    return AnswerMetric(metric, answered, tokenizer) if metric is not None and answered is not None else None


def _answered_rows(prepared: Prepared, config: Config) -> ExampleTable | None:
    """The examples that are answered for evaluation.metric: the first of those that evaluation.rows selects, None without any."""
    table, rows = prepared.evaluation, config.evaluation.rows
    if table is None:
        return None
    most = min(ANSWERED_ROWS, rows) if isinstance(rows, int) else ANSWERED_ROWS
    return table.examples_of(np.sort(_selection_order(prepared, table)[:most]))


def held_out_tokens(prepared: Prepared) -> NDArray[np.int64]:
    """Tokens of each held-out row that has an example, in the order in which rows are selected."""
    table = prepared.evaluation
    if table is None:
        return np.empty(0, np.int64)
    tokens: NDArray[np.int64] = np.diff(table.offsets[table.firsts])[_selection_order(prepared, table)]
    return tokens


def evaluated_rows(prepared: Prepared, config: Config) -> ExampleTable | None:
    """The examples that evaluation.rows selects, in the order of the file; None when nothing is held out.

    Rows with the smallest hashes of content come first, so that fewer rows are a subset of more, whatever the order of the file.
    """
    table, rows = prepared.evaluation, config.evaluation.rows
    if table is None or not isinstance(rows, int):
        return table
    selected = selected_rows(prepared, config)
    return table if rows > len(selected) else table.examples_of(selected)


def selected_rows(prepared: Prepared, config: Config) -> NDArray[np.int64]:
    """The rows of the held-out table that `evaluated_rows` has, in the order of the file."""
    table, rows = prepared.evaluation, config.evaluation.rows
    if table is None:
        return np.empty(0, np.int64)
    order = _selection_order(prepared, table)
    return np.sort(order[:rows] if isinstance(rows, int) else order)


def _selection_order(prepared: Prepared, table: ExampleTable) -> NDArray[np.int64]:
    """The rows that have an example, those with the smallest hashes first."""
    rows = np.flatnonzero(np.diff(table.firsts))
    return rows[np.argsort(prepared.evaluation_hashes[rows], kind="stable")]
