"""Finds the run and the checkpoint that a command line names: a folder, a run, a run id or part of one, or `latest`."""

import contextlib
import difflib
import json
import re
import shlex
from pathlib import Path

from llamahome.checkpoint import manifest
from llamahome.checkpoint.state import STATE, read_state
from llamahome.durable import read_object
from llamahome.errors import CheckpointError, Problem, UsageError
from llamahome.known_runs import ambiguous, known_runs, newest_run, runs_called
from llamahome.rundir import RUNS, SWEEP_FILE, RunPaths, as_typed, first_command, free_beside, open_run

_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")


def resolve(target: str, *, command: str = "llamahome train-resume") -> tuple[RunPaths, Path | None]:
    """The run that `target` names, and the checkpoint if it names one; otherwise the caller uses `store.choose`.

    A part of a run id is enough if only one run id contains it. Raises UsageError run.ambiguous if several do, CheckpointError
    checkpoint.not-a-checkpoint, which says what `target` is and offers `command` for a similar run.
    """
    if target == "latest":
        return open_run(_newest_run()), None
    runs = known_runs()
    for folder in (Path(target), runs.get(target, RUNS / target)):
        folder = folder.resolve()
        if not folder.is_dir():
            continue
        if (folder / manifest.NAME).is_file() and not folder.name.endswith(".tmp"):
            return open_run(folder.parent), folder
        if _is_run(folder):
            return open_run(folder), None
    if match := _run_by_part(target, command):
        return open_run(match), None
    hint = _command_of_sweep(Path(target)) or _command_of_similar_run(command, target)
    raise CheckpointError(Problem(code="checkpoint.not-a-checkpoint", message=_describe(Path(target)), where=target, hint=hint))


def names_run(target: str) -> bool:
    """Whether `target` names a run and not a checkpoint. Raises UsageError run.ambiguous."""
    if target == "latest" or any((folder / "run_id").is_file() for folder in (Path(target), RUNS / target)):
        return True
    return bool(_run_by_part(target))


def _run_by_part(part: str, command: str | None = None) -> Path | None:
    """The only run that is called `part`, or whose id contains it; if several do, the hint is `command` for the newest of them."""
    runs = known_runs() if not Path(part).exists() else {}
    if part in runs:
        return runs[part]
    similar = runs_called(part, runs)
    if len(similar) > 1:
        hint = f"{command} {similar[-1]}" if command else "llamahome runs list"
        raise UsageError(ambiguous(part, similar, hint=hint))
    return runs[similar[0]] if similar else None


def _newest_run() -> Path:
    newest = newest_run()
    if newest is None:
        message = f"there is no run yet under {RUNS}"
        raise CheckpointError(Problem(code="checkpoint.none", message=message, where="latest", hint=first_command()))
    return newest


def _is_run(folder: Path) -> bool:
    checkpoints = (checkpoint for _, checkpoint in RunPaths(folder, folder.name).checkpoints())
    return (folder / "run_id").is_file() or any((checkpoint / manifest.NAME).is_file() for checkpoint in checkpoints)


def _describe(path: Path) -> str:
    if not path.exists():
        return "there is no such checkpoint, run or folder"
    if path.is_file():
        return "this is a file, not a checkpoint folder"
    if path.name.endswith(".tmp"):
        return "this is a checkpoint that was never finished"
    if _CHECKPOINT_NAME.fullmatch(path.name):
        return f"this checkpoint folder has no {manifest.NAME}: it is damaged or another program wrote it"
    if any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
        return "this is a trained model without optimizer and position, which cannot be resumed"
    if (path / SWEEP_FILE).is_file():
        return "this is the folder of a sweep, which goes on with the command that began it; its runs are under trials/"
    if any(path.iterdir()):
        return "this folder is neither a checkpoint nor a run"
    return "this folder is empty"


def _command_of_sweep(folder: Path) -> str | None:
    """The command of the sweep in this folder; None if there is none or its file is damaged."""
    try:
        words = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))["command"]
        return shlex.join(["llamahome", *words])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _command_of_similar_run(command: str, target: str) -> str:
    """`command` for the run that contains the path, or else for the run with the most similar name, or else for the newest run."""
    for parent in Path(target).resolve().parents:
        if _is_run(parent):
            return f"{command} {as_typed(parent)}"
    newest_first = list(known_runs())[::-1]
    if not newest_first:
        return first_command()
    name = Path(target).name
    similar = difflib.get_close_matches(name, newest_first, n=3, cutoff=0.5)
    containing = [run_id for run_id in newest_first if name and name in run_id]
    suggested = (containing or similar or newest_first)[:3]
    others = f"   (also similar: {', '.join(suggested[1:])})" if suggested[1:] else ""
    return f"{command} {shlex.quote(suggested[0])}{others}"


def resume_older(folder: Path) -> str:
    """The command that resumes the newest intact checkpoint older than `folder`, or else starts again."""
    step = re.search(r"(\d+)$", folder.name)
    root = folder.parent
    older = [(number, path) for number, path in RunPaths(root, root.name).checkpoints() if step is None or number < int(step[1])]
    for _, path in reversed(older):
        if not manifest.verify(path):
            return f"llamahome train-resume {as_typed(path)}"
    return start_again(root, root / "config.yaml")


def start_again(root: Path, config: Path) -> str:
    """The command for a new run with the settings of the run in `root`, on the same data, which its checkpoints or its folder name."""
    paths = RunPaths(root, root.name)
    data: object = read_object(paths.environment).get("data")
    for _, folder in paths.checkpoints():
        with contextlib.suppress(CheckpointError, KeyError):
            data = read_state(folder / STATE).extra["data_path"]
    typed = [data] if isinstance(data, str) else [str(each) for each in data] if isinstance(data, list | tuple) else []
    command = f"llamahome train {shlex.join(typed)}" if typed else first_command()
    output = "" if root.resolve().parent == RUNS.resolve() else f" --output {free_beside(root)}"
    return f"{command} --config {as_typed(config)}{output}"
