"""sweep: a run for every combination of listed values, one after another or side by side, and the table that compares them."""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamahome.cli import options
from llamahome.units import many

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig
    from llamahome.errors import ConfigError
    from llamahome.sweep.grid import Grid, Trial
    from llamahome.sweep.trials import Runner


@click.command(
    epilog=options.examples(
        "llamahome sweep chats.jsonl --set training.learning_rate=1e-5,3e-5,1e-4 --set lora.rank=8,32",
        "llamahome sweep chats.jsonl --set lora.target_modules=[q_proj,v_proj],all-linear --seeds 3",
    )
)
@click.argument("data_paths", metavar="DATA_PATH...", nargs=-1, callback=options.not_options, required=True, help="Rows, as for train.")
@options.model
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Folder of the sweep  [default: output/sweeps/<id>].")
@options.from_adapter
@options.course
@click.option(
    "--set",
    "listed",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="A setting and its values, separated by commas; a comma inside [] or quotes belongs to a value.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Runs of each combination, with different training.seed.")
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time  [default: one for each GPU, 1 without].")
@click.option("--prune", type=click.Choice(["auto", "off"]), default="auto", help="Stop early what is plainly worse.")
@click.option("--keep-all", is_flag=True, help="Keep the models of all runs, not only the best.")
@click.option("--dry-run", is_flag=True, help="Show the runs and how long they take; start nothing.")
@options.meeting
@options.as_json
@options.pass_overrides
def sweep(
    overrides: options.Overrides,
    data_paths: tuple[str, ...],
    output: Path | None,
    listed: tuple[str, ...],
    seeds: int,
    jobs: int | None,
    prune: str,
    keep_all: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train once for every combination of listed values and compare. The same command again goes on after any end."""
    from llamahome.cli.sweep_devices import make_slots, show_plan
    from llamahome.sweep import course
    from llamahome.sweep.grid import make_grid, warnings_of
    from llamahome.sweep.table import shown_figure
    from llamahome.sweep.trials import Runner

    fixed = overrides.load()
    _refuse_machines(fixed)
    _fix_adapter(overrides, fixed)
    added = list(_comparable(fixed, {each.partition("=")[0].strip() for each in listed}))
    flags = {key: flag for key, (flag, _) in overrides.flags.items()}
    grid = make_grid(listed, seeds, lambda each: replace(overrides, assignments=[*added, *each]).load(), flags)
    say = _each_line_once(options.note)
    for line in warnings_of(grid):
        say(f"warning: {line}")
    files = _check(grid, data_paths, say)
    pruning = prune == "auto" and grid.trials[0].figure == "loss"
    slots = make_slots(jobs, grid, data_paths, say=say)
    if dry_run:
        show_plan(grid, data_paths, len(slots), as_json=as_json, say=say)
        return
    mark = course.fingerprint(data_paths, grid, prune=pruning)
    folder = output or course.SWEEPS / mark
    words = [*data_paths, *overrides.typed()]

    def train(trial: "Trial", root: Path | None) -> list[str]:
        place = ["--output", str(root), "--set", f"output.name={folder.resolve().name}-{trial.name}"] if root is not None else []
        return ["train", *words, *place, *(word for each in [*added, *trial.assignments] for word in ("--set", each))]

    lock = course.open_folder(folder, mark, course.content_of(files), sys.argv[1:], say=options.note)
    options.note(f"sweep: {len(grid.trials)} runs, {len(slots)} at a time, in {folder}")
    if grid.trials[0].figure != "loss":
        why = "it is evaluation.metric" if grid.trials[0].chosen_by != "loss" else "the loss of runs with other constants does not compare"
        options.note(f"ranked by held-out {shown_figure(grid.trials[0].figure)}, because {why}")
    options.note(f"each is: llamahome {shlex.join(train(grid.trials[0], folder / 'trials' / '001'))}")
    runner = Runner(folder, train, slots, lock, options.note)
    with _stopping(runner):
        standing = course.run_rounds(runner, grid.trials, prune=pruning)
    best = _best(standing.rows, train)
    result = course.write_results(folder, standing, sys.argv[1:], best[1])
    _show(result, standing.rows, as_json)
    if not standing.complete:
        _raise_stopped()
    if best[0] is None:
        _raise_without_best(standing.rows)
    if not keep_all and (count := course.remove_models(folder, grid.trials, keep=best[0])):
        options.note(f"removed the models of {many(count, 'run')}; --keep-all keeps them, their results stay")


def _comparable(loaded: "LoadedConfig", listed: set[str]) -> Iterator[str]:
    """What makes runs comparable: the same rows evaluated at the same shares of the steps, and the same arithmetic, whatever the speed.

    `training.compile: auto` depends on what an earlier run has compiled, so the bits of a trial that starts again might differ.
    """
    from llamahome.config.load import is_chosen

    def is_open(key: str, value: object) -> bool:
        return value == "auto" and key not in listed and not is_chosen(loaded.origins[key])

    training = loaded.config.training
    if is_open("training.compile", training.compile):
        yield "training.compile=false"
    if is_open("evaluation.rows", loaded.config.evaluation.rows):
        yield "evaluation.rows=all"
    if is_open("evaluation.every", loaded.config.evaluation.every):
        if training.max_steps is not None:
            yield f"evaluation.every={max(1, training.max_steps // 10)} steps"
        else:
            yield f"evaluation.every={0.25 if training.epochs == 'auto' else max(0.01, round(training.epochs / 10, 2)):g} epochs"


def _each_line_once(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` for lines that were not said before, because checking the rows and planning the runs read the same rows."""
    said: set[str] = set()

    def say_once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return say_once


def _check(grid: "Grid", data_paths: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Raise what any of the runs cannot be, before the first starts; returns the files of rows that they read."""
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_evaluate, to_train

    files: list[str] = []
    for loaded in grid.loaded:
        _check_held_out(loaded)
        _refuse_machines(loaded)
    known = set()
    for loaded in grid.loaded:
        data = loaded.config.data
        if (shown := repr((to_train(data), to_evaluate(data), data.eval_path))) not in known:
            found = locate(list(data_paths), wanted=to_train(data))
            files += [*found.files, *found.evaluation]
            if data.eval_path is not None:
                files += locate(data.eval_path, wanted=to_evaluate(data)).files
        known.add(shown)
    _check_adapters(grid)
    _check_rows(grid, data_paths, say)
    return files


def _refuse_machines(loaded: "LoadedConfig") -> None:
    from llamahome.errors import Problem, UsageError

    distributed = loaded.config.distributed
    if distributed.most_nodes > 1 or distributed.node_rank > 0:
        message = "the runs of a sweep are started on one machine"
        where = "distributed.num_nodes" if distributed.most_nodes > 1 else "distributed.node_rank"
        raise UsageError(Problem(code="sweep.several-machines", message=message, where=where))


def _fix_adapter(overrides: options.Overrides, loaded: "LoadedConfig") -> None:
    """Put the folder in place of the name of a run, because `latest` may be another one when a later run of the sweep starts."""
    from llamahome.checkpoint.target import names_run, resolve
    from llamahome.rundir import nearby

    target = loaded.config.model.adapter
    if target is None or "model.adapter" not in overrides.flags or not names_run(target):
        return
    paths, checkpoint = resolve(target)
    overrides.flags["model.adapter"] = ("--from-adapter", str(nearby(checkpoint or (paths.final if paths.final.is_dir() else paths.root))))


def _check_adapters(grid: "Grid") -> None:
    """Raise ConfigError if a listed value contradicts the adapter that training goes on from."""
    if all(loaded.config.model.adapter is None for loaded in grid.loaded):
        return
    from llamahome.cli.train import importing_torch

    with importing_torch():
        from llamahome.starting_adapter import with_adapter
    for loaded in grid.loaded:
        with_adapter(loaded, say=lambda _: None)


def _check_held_out(loaded: "LoadedConfig") -> None:
    from llamahome.errors import ConfigError, Problem

    data = loaded.config.data
    if data.eval_split == 0 and data.eval_path is None:
        message = "no rows are held out, so the runs could not be compared"
        raise ConfigError(
            Problem(code="sweep.nothing-held-out", message=message, where="data.eval_split", hint="--set data.eval_split=auto")
        )


def _check_rows(grid: "Grid", data_paths: Sequence[str], say: Callable[[str], None]) -> None:
    """Raise ConfigError if a run would have no rows to evaluate on. What is tokenized for it stays for the run."""
    from llamahome.cli.train import importing_torch

    with importing_torch():
        from llamahome.run_rows import holds_out
    known: set[str] = set()
    for trial, loaded in zip(grid.trials, grid.loaded, strict=True):
        config = loaded.config
        key = repr((config.data, config.model, config.training.objective))
        if key not in known and not holds_out(loaded, data_paths, say=say if not known else lambda _: None):
            values = ", ".join(f"{key}={value}" for key, value in trial.values.items() if key.startswith("data."))
            raise _nothing_held_out(f"with {values}: " if values else "")
        known.add(key)


def _nothing_held_out(place: str = "", end: str = "") -> "ConfigError":
    from llamahome.errors import ConfigError, Problem

    message = f"{place}data.eval_split held out none of these rows, so the runs cannot be compared{end}"
    where, hint = "data.eval_split", "--set data.eval_split=0.2"
    return ConfigError(Problem(code="sweep.nothing-held-out", message=message, where=where, hint=hint))


@contextmanager
def _stopping(runner: "Runner") -> Iterator[None]:
    """SIGINT and SIGTERM stop the trials with a checkpoint; once more, they leave at once."""

    def receive(*_: object) -> None:
        options.note("\nstopping the trials with a checkpoint; once more leaves at once" if not runner.asked else "\nleaving at once")
        runner.stop()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_stopped() -> None:
    from llamahome.errors import Problem, Stopped

    hint = shlex.join(["llamahome", *sys.argv[1:]])
    raise Stopped(Problem(code="sweep.stopped", message="the sweep was stopped; the same command goes on", hint=hint))


def _raise_without_best(rows: Sequence[Any]) -> None:
    """Raise why no run is the best, while all models are still there: all have failed, or nothing was held out of the rows."""
    from llamahome.errors import LlamaHomeError, Problem

    ended = [progress for row in rows for _, progress in row.trials]
    if all(progress.state == "failed" for progress in ended):
        excerpt = "\n".join(dict.fromkeys(progress.reason for progress in ended))
        raise LlamaHomeError(Problem(code="sweep.all-failed", message="no run has finished", excerpt=excerpt))
    if not any(progress.losses for progress in ended):
        raise _nothing_held_out(end="; their models are kept")


def _best(rows: Sequence[Any], train: "Callable[[Trial, Path | None], list[str]]") -> tuple["Trial | None", str | None]:
    from llamahome.sweep.table import best_trial

    trial = best_trial(rows)
    return trial, shlex.join(["llamahome", *train(trial, None)]) if trial is not None else None


def _show(result: dict[str, Any], rows: Sequence[Any], as_json: bool) -> None:
    from llamahome.sweep.table import table_lines

    if as_json:
        print(json.dumps(result))
        return
    print("\n".join(table_lines(rows)))
    print(f"results     {result['folder']}/sweep.json, sweep.csv, sweep.svg")
    if result["best"]:
        print(f"the best:\n  {result['best']['command']}")
