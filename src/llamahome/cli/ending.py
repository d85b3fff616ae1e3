"""Prints the summary at the end of a run on stdout: its results, its files, and the next commands."""

import math
import os
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamahome.pipeline import Result

_LABEL_WIDTH = 12
_MAX_LINES = 8
"""Of a prompt or an answer; the middle of a longer one is left out."""
_MAX_WIDTH = 120


def show_result(result: "Result", data_paths: Sequence[str]) -> None:
    """Print the summary; only rank 0 prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    from llamahome.known_runs import to_type
    from llamahome.monitoring.display import metric_name
    from llamahome.resuming import cut_short
    from llamahome.rundir import as_typed
    from llamahome.units import many, show_count, show_seconds

    state, paths = result.outcome.state, result.paths
    _show_samples(result)
    steps = f"{state.step:,} {'step' if state.step == 1 else 'steps'}"
    why = f" in {many(state.evaluations_without_gain, 'evaluation')}" if result.outcome.reason == "no gain" else ""
    print(f"\n{result.outcome.reason}{why} after {steps}, {show_count(state.tokens)} tokens, {show_seconds(state.elapsed_s)}")
    if result.kwh is not None:
        print(f"energy          {result.kwh:.3g} kWh, as the counters of processors and GPUs measured it")
    loss = result.last.loss if result.last is not None else state.eval_loss
    if loss is not None and result.first is not None:
        change = loss / result.first.loss - 1 if result.first.loss else 0.0
        share = f"  ({change:+.1%})" if math.isfinite(change) else ""
        print(f"held-out loss   {result.first.loss:.4f} -> {loss:.4f}{share}")
    if result.last is not None and result.first is not None:
        if result.last.unit == "target":
            print(f"perplexity      {result.first.perplexity:.2f} -> {result.last.perplexity:.2f}")
        accuracy = "token accuracy" if result.last.unit == "target" else f"{result.last.unit} accuracy"
        print(f"{accuracy:<15} {result.first.accuracy:.1%} -> {result.last.accuracy:.1%}")
    metric = result.loaded.config.evaluation.metric
    if result.last is not None and result.last.score is not None and result.first is not None and result.first.score is not None:
        print(f"{metric_name(metric):<15} {result.first.score:.4f} -> {result.last.score:.4f}")
    if result.final_note is not None:
        print(result.final_note)
    elif metric != "loss":
        print(_best_line(result))
    elif state.best_step is not None and state.best_step != state.step:
        where = paths.checkpoint(state.best_step)
        better = f": {as_typed(where)}" if where.is_dir() else ""
        print(f"lowest held-out loss {state.best_loss:.4f} after step {state.best_step:,}{better}")
    for advice in (cut_short(result.outcome, result.loaded), _overfitting_advice(result)):
        if advice is not None:
            print(advice)
    final = as_typed(paths.final)
    print(f"model       {final}")
    print(f"checkpoint  {as_typed(paths.checkpoint(state.step))}")
    if paths.metrics_dir.is_dir():
        print(f"metrics     {as_typed(paths.metrics_dir)}")
    if paths.profile.is_dir():
        print(f"profile     {as_typed(paths.profile)}")
    if paths.report.is_file():
        print(f"report      {as_typed(paths.report)}")
    print("next:")
    print(f"  llamahome chat {final}{_system_option(state.extra)}")
    if result.format_name not in ("preference", "labelled", "prompts"):  # train-eval measures good answers
        print(f"  llamahome train-eval {final} {shlex.join(data_paths)}")
    print(f"  llamahome runs show {to_type(paths)}")


def _system_option(extra: dict[str, Any]) -> str:
    """` --system TEXT` with the message that all training rows begin with, if it is one short line."""
    from llamahome.system_message import of_state

    text = of_state(extra) or ""
    return f" --system {shlex.quote(text)}" if text and len(text) <= _MAX_WIDTH and text.isprintable() else ""


def _best_line(result: "Result") -> str:
    """Where evaluation.metric was best, if it is not the loss."""
    from llamahome.monitoring.display import metric_name

    state = result.outcome.state
    judged = state.extra.get("judged", {})
    if state.best_step is None or judged.get("best") is None:
        return f"no evaluation had a finite {metric_name(result.loaded.config.evaluation.metric)}"
    return f"best {metric_name(judged['metric'])} {judged['best']:.4f} after step {state.best_step:,}"


def _overfitting_advice(result: "Result") -> str | None:
    """If the held-out loss has risen above its lowest value by more than its noise: by how much, and what to type instead."""
    from llamahome.rundir import as_typed

    state, last, training = result.outcome.state, result.last, result.loaded.config.training
    if result.loaded.config.evaluation.metric != "loss" or result.final_note is not None:
        return None
    if last is None or state.best_loss is None or state.best_step is None or not last.loss - state.best_loss > last.noise:
        return None
    risen = f"over-fitted: the held-out loss rose {last.loss / state.best_loss - 1:.1%} since step {state.best_step:,}, more than its noise"
    if not state.best_step:
        rate = f"{float(training.learning_rate) / 10:.2g}"
        return f"{risen}; it was lowest before training: train on other rows, or with --set training.learning_rate={rate}"
    shorter = f"--max-steps {state.best_step}"
    if training.max_steps is None:
        shorter = f"--epochs {float(f'{float(training.epochs) * state.best_step / state.step:.2g}'):g}"
    best = result.paths.checkpoint(state.best_step)
    return f"{risen}; train with {shorter}" + (f", or use {as_typed(best / 'model')}" if best.is_dir() else "")


def _show_samples(result: "Result") -> None:
    kind = "a row that was held out" if result.first is not None else "a row of the training data"
    for number, sample in enumerate(result.samples, 1):
        print(f"\nsample {number} of {len(result.samples)}, {kind}")
        for name, text in (
            ("prompt", sample.prompt.shown),
            ("reference", sample.prompt.reference),
            ("before", sample.before),
            ("after", sample.after),
        ):
            print("\n".join(_block(name, text)))


def _block(name: str, text: str) -> list[str]:
    """`text` beside its name. Long lines are wrapped, and the middle is left out if there are too many lines."""
    width = max(40, min(_MAX_WIDTH, shutil.get_terminal_size().columns)) - _LABEL_WIDTH
    visible = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text.expandtabs(4))
    lines = [part for line in visible.splitlines() if line.strip() for part in _wrapped(line, width)] or ["(nothing)"]
    if len(lines) > _MAX_LINES:
        half = _MAX_LINES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half + 1} lines ...", *lines[len(lines) - half + 1 :]]
    return [f"{name if not number else '':<{_LABEL_WIDTH}}{line}" for number, line in enumerate(lines)]


def _wrapped(line: str, width: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())][: width // 2]
    return textwrap.wrap(line.strip(), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
