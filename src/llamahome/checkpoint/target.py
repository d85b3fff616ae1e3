"""What people call a checkpoint (a folder, a run, a run id, `latest`) -> the run and, if one was named, the checkpoint in it."""

import difflib
import re
import shlex
from pathlib import Path

from llamahome.checkpoint import manifest
from llamahome.errors import CheckpointError, Problem, UsageError
from llamahome.rundir import NEWEST, RUNS, RunPaths, as_typed, first_command, open_run

_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")


def resolve(target: str) -> tuple[RunPaths, Path | None]:
    """The run that `target` means, and the checkpoint when it names one; `store.choose` picks one otherwise.

    A run may be named by a part that only one run id has; UsageError run.ambiguous when several have it. Raises CheckpointError
    checkpoint.not-a-checkpoint that says what `target` is and which runs are near.
    """
    if target == "latest":
        return open_run(_newest_run()), None
    for folder in (Path(target), RUNS / target):
        folder = folder.resolve()
        if not folder.is_dir():
            continue
        if (folder / manifest.NAME).is_file() and not folder.name.endswith(".tmp"):
            return open_run(folder.parent), folder
        if _is_run(folder):
            return open_run(folder), None
    if named := _holding(target):
        return open_run(named), None
    raise CheckpointError(
        Problem(code="checkpoint.not-a-checkpoint", message=_what_it_is(Path(target)), where=target, hint=_nearest(target))
    )


def names_run(target: str) -> bool:
    """Whether `resolve` would take `target` for a run rather than for a checkpoint. Raises UsageError run.ambiguous."""
    return target == "latest" or any((folder / "run_id").is_file() for folder in (Path(target), RUNS / target)) or bool(_holding(target))


def _holding(part: str) -> Path | None:
    """The only run whose id holds `part`."""
    found = [run for run in _known_runs() if part and part in run.name and not Path(part).exists()]
    if len(found) > 1:
        shown = "\n".join(run.name for run in found[:-11:-1])
        message = f"{part!r} is a part of {len(found)} run ids" + (", the newest ten of which are" if len(found) > 10 else "")
        raise UsageError(Problem(code="run.ambiguous", message=message, excerpt=shown, hint="llamahome runs list"))
    return found[0] if found else None


def _newest_run() -> Path:
    if NEWEST.is_dir() and _is_run(NEWEST):
        return NEWEST
    runs = _known_runs()
    if runs:
        return runs[-1]
    message = f"there is no run yet under {RUNS}"
    raise CheckpointError(Problem(code="checkpoint.none", message=message, where="latest", hint=first_command()))


def _known_runs() -> list[Path]:
    """Oldest first: a run id starts with its date and time."""
    return sorted(path for path in RUNS.iterdir() if _is_run(path)) if RUNS.is_dir() else []


def _is_run(folder: Path) -> bool:
    held = (checkpoint for _, checkpoint in RunPaths(folder, folder.name).checkpoints())
    return (folder / "run_id").is_file() or any((checkpoint / manifest.NAME).is_file() for checkpoint in held)


def _what_it_is(path: Path) -> str:
    if not path.exists():
        return "there is no such checkpoint, run or folder"
    if path.is_file():
        return "this is a file, not a checkpoint folder"
    if path.name.endswith(".tmp"):
        return "this is a checkpoint whose writing was never finished"
    if _CHECKPOINT_NAME.fullmatch(path.name):
        return f"this checkpoint folder has no {manifest.NAME}: it is damaged or another program wrote it"
    if any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
        return "this is a trained model without optimizer and position, which cannot be resumed"
    if any(path.iterdir()):
        return "this folder is neither a checkpoint nor a run"
    return "this folder is empty"


def _nearest(target: str) -> str:
    """The command for the run around the path, else for the run with the nearest name, else for the newest."""
    for around in Path(target).resolve().parents:
        if _is_run(around):
            return f"llamahome train-resume {as_typed(around)}"
    runs = _known_runs()
    if not runs:
        return first_command()
    near = difflib.get_close_matches(Path(target).name, [run.name for run in runs], n=3, cutoff=0.5)
    named = [run.name for run in reversed(runs) if Path(target).name and Path(target).name in run.name]
    shown = (named or near or [run.name for run in reversed(runs)])[:3]
    others = f"   (also near: {', '.join(shown[1:])})" if shown[1:] else ""
    return f"llamahome train-resume {shlex.quote(shown[0])}{others}"
