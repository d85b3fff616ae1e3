"""train, train-distributed and train-resume: each reads its settings, calls pipeline.py and prints the result."""

import gc
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llamahome.cli import options

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig
    from llamahome.rundir import RunPaths


@click.command(
    epilog=options.examples(
        "llamahome train data/training/raw",
        "llamahome train chats.jsonl --epochs 3 --output output/chats",
        "llamahome train chats.jsonl --method full --set training.batch_size=16",
        "llamahome train more-chats.jsonl --from-adapter brisk-otter",
    )
)
@click.argument("data_paths", metavar="DATA_PATH...", nargs=-1, callback=options.not_options, required=True, help=options.DATA_HELP)
@options.model
@options.from_adapter
@options.output
@options.course
@options.assignments
@options.meeting
@options.debug
@options.pass_overrides
def train(overrides: options.Overrides, data_paths: tuple[str, ...], debug: bool) -> None:
    """Teach a model your data."""
    from llamahome.distributed.failures import run_to_go_on, tie_to_launcher
    from llamahome.distributed.rank_status import RankStatus
    from llamahome.distributed.standing import READ
    from llamahome.distributed.watchdog import open_watchdog
    from llamahome.logs import log_to_stderr

    tie_to_launcher()
    log_to_stderr(debug=debug)
    loaded = overrides.load()
    if run_to_go_on() is None:
        with open_watchdog(loaded.config.training.hang_timeout, RankStatus()).watching(READ):
            check_paths(loaded, list(data_paths))
    if _launch_processes(loaded):
        return
    with importing_torch():
        from llamahome import pipeline
        from llamahome.cli.ending import show_result
        from llamahome.planning.run_memory import MemoryPlan

    show_result(pipeline.train(list(data_paths), loaded, command=sys.argv, memory_plan=MemoryPlan()), data_paths)


@click.command(
    epilog=options.examples(
        "llamahome train-resume latest",
        "llamahome train-resume output/training/checkpoint-40 --epochs 2",
        "llamahome train-resume brisk-otter --output output/gentler --set training.learning_rate=1e-5",
    )
)
@click.argument("checkpoint", help="A checkpoint, a run folder, a run id or a part of one, or `latest`.")
@options.setting("--output", "output.dir", "Continue in a new run in this folder; the old one stays as it is")
@options.epochs
@options.max_steps
@options.assignments
@click.option(
    "--allow-changed",
    multiple=True,
    metavar="data|base",
    help="Continue although the data or the base model changed; may be given again.",
)
@options.debug
@options.pass_overrides
def train_resume(overrides: options.Overrides, checkpoint: str, allow_changed: tuple[str, ...], debug: bool) -> None:
    """Continue a stopped run, bit for bit as if it had not been stopped; or start a new run from it."""
    _set_torch_environment()  # before the reader of checkpoints, which imports torch
    from llamahome.checkpoint.store import CONFIG, choose
    from llamahome.checkpoint.target import resolve
    from llamahome.config.load import LoadedConfig, read_saved_config, with_assignments
    from llamahome.distributed.failures import run_to_go_on, tie_to_launcher
    from llamahome.distributed.rank_status import RankStatus
    from llamahome.distributed.standing import CHECKPOINT, READ
    from llamahome.distributed.watchdog import open_watchdog
    from llamahome.errors import Problem, UsageError
    from llamahome.logs import log_to_stderr

    tie_to_launcher()
    log_to_stderr(debug=debug)
    target = str(run_to_go_on() or checkpoint)
    unknown = sorted(set(allow_changed) - {"data", "base"})
    if unknown:
        message = f"{unknown[0]!r} cannot be allowed to change; data and base can"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--allow-changed", hint="--allow-changed data"))

    def change(saved: Path) -> LoadedConfig:
        return with_assignments(read_saved_config(saved), overrides.assignments, flags=overrides.flags)

    with open_watchdog("auto", RankStatus()).watching(CHECKPOINT):
        paths, folder = resolve(target)
        newest = folder or choose(paths, warn=lambda _: None)
    loaded = change(newest / CONFIG)
    if run_to_go_on() is None:
        with open_watchdog(loaded.config.training.hang_timeout, RankStatus()).watching(READ):
            named = str((folder or paths.root).resolve())
            _check_rows_are_here(paths, newest, loaded, [named if word == target else word for word in sys.argv[1:]])
    if _launch_processes(loaded):
        return
    with importing_torch():
        from llamahome import pipeline
        from llamahome.cli.ending import show_result
        from llamahome.planning.run_memory import MemoryPlan

    result = pipeline.resume(target, change, allowed=list(allow_changed), command=sys.argv, memory_plan=MemoryPlan())
    data_path = result.outcome.state.extra["data_path"]
    show_result(result, [data_path] if isinstance(data_path, str) else data_path)


def _check_rows_are_here(paths: "RunPaths", checkpoint: Path, loaded: "LoadedConfig", typed: list[str]) -> None:
    """Raise before torch is imported if the data of the run is gone, or lies in another folder, where `typed` is to be typed."""
    from llamahome.checkpoint.state import STATE, read_state
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_train
    from llamahome.errors import CheckpointError, DataError

    try:
        named = read_state(checkpoint / STATE).extra["data_path"]
        locate(named, wanted=to_train(loaded.config.data))
    except (CheckpointError, KeyError):
        return  # a damaged checkpoint is described when it is read
    except DataError as error:
        problem = error.problems[0]
        if problem.code != "data.not-found":
            raise
        hint = "train-resume goes on with the same rows: put them back, or begin a new run with `llamahome train`"
        if paths.project != Path():
            hint = f"cd {shlex.quote(str(paths.project))} && {shlex.join(['llamahome', *typed])}"
        message = f"{problem.message}, and the run {paths.run_id} learned from it"
        raise DataError(replace(problem, message=message, hint=hint)) from error


def check_paths(loaded: "LoadedConfig", data_path: list[str]) -> None:
    """Raise before torch is imported if data is missing, or if the output folder holds a run or cannot be written."""
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_evaluate, to_train
    from llamahome.rundir import refuse_unwritable, refuse_used

    output = Path(loaded.config.output.dir) if loaded.config.output.dir else None
    if output is not None and loaded.config.distributed.node_rank == 0:  # other machines join a run that machine 0 may have started
        refuse_used(output)
    refuse_unwritable(output)
    locate(data_path, wanted=to_train(loaded.config.data))
    if loaded.config.data.eval_path is not None:
        locate(loaded.config.data.eval_path, wanted=to_evaluate(loaded.config.data))


@contextmanager
def importing_torch() -> Iterator[None]:
    """Say that torch and transformers are loading, which takes seconds, and set the environment variables that they read only then.

    The imported modules stay alive, so the garbage collector skips them during the import and afterwards; measured: a quarter less
    time (docs/log.md).
    """
    _set_torch_environment()
    if os.environ.get("RANK", "0") == "0" and "transformers" not in sys.modules:
        with suppress(OSError):  # a full disk behind stderr is no reason to stop
            print("loading torch and transformers ...", file=sys.stderr, flush=True)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _set_torch_environment() -> None:
    """Set how torch's threads wait and how much memory it keeps; torch reads this once, when it is imported."""
    from llamahome.distributed.processors import bound_caches, keep_freed_memory, share_processors

    share_processors(os.environ)
    bound_caches(os.environ)
    keep_freed_memory(os.environ)
    if "--debug" not in sys.argv:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the warnings of a waiting store end as an error of ours


def _launch_processes(loaded: "LoadedConfig") -> bool:
    """Start the processes if the settings ask for more than this one, or for restarts, and wait for them; raises Exit if one fails.

    Returns whether they ran. Raises ConfigError if settings contradict each other.
    """
    from llamahome.distributed.launch import launch, needs_launch
    from llamahome.distributed.rank_info import find_rank_info

    _set_torch_environment()  # before needs_launch, which imports torch to count the GPUs
    options.check_settings(loaded)
    restarts = loaded.config.training.restart == "auto" and not find_rank_info(os.environ).joins
    if not needs_launch(loaded.config.distributed, os.environ) and not restarts:
        return False
    status = launch(sys.argv[1:], loaded.config.distributed, say=options.note)
    if status:
        raise click.exceptions.Exit(status)
    return True
