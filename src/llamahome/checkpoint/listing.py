"""What lies in the folder of a run: whole, damaged, half-written, foreign and superseded checkpoints. Only reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamahome.checkpoint import manifest
from llamahome.checkpoint.state import STATE, TrainerState, judged_by, judged_cost, read_state
from llamahome.errors import CheckpointError, Problem
from llamahome.rundir import RunPaths

Kind = Literal["whole", "damaged", "half-written", "foreign", "superseded", "being removed"]

_MEANING: dict[str, Kind] = {".trash-": "being removed", ".tmp": "half-written", "superseded-": "superseded"}


@dataclass(frozen=True)
class Listed:
    """One folder of a run that is, was or will be a checkpoint."""

    path: Path
    kind: Kind
    """`whole` without reading the files means: the manifest is intact and every file has its size. `foreign`: of another run, or another
    program wrote it; a run that started from another run's checkpoint holds one."""
    step: int | None
    bytes: int
    written: float
    """Unix seconds."""
    state: TrainerState | None
    """None if it cannot be read."""
    problems: list[Problem]


def list_checkpoints(paths: RunPaths, *, check: Callable[[Path], list[Problem]] = manifest.compare_sizes) -> list[Listed]:
    """Every checkpoint folder of a run, by step; `check` finds the problems of one: `manifest.verify` reads every byte."""
    found = [path for path in paths.root.iterdir() if path.is_dir() and "checkpoint-" in path.name] if paths.root.is_dir() else []
    return sorted((_listed(path, paths.run_id, check) for path in found), key=lambda each: (each.step or 0, each.path.name))


def best_of(listed: Sequence[Listed]) -> Listed | None:
    """The best whole checkpoint by evaluation.metric of the newest one, the earlier of equal ones; None if none was evaluated."""
    whole = [(each, each.state) for each in listed if each.kind == "whole" and each.state is not None]
    metric = judged_by(whole[-1][1]) if whole else "loss"
    costs = [(cost, number) for number, (_, state) in enumerate(whole) if (cost := judged_cost(state, metric)) is not None]
    return whole[min(costs)[1]][0] if costs else None


def _listed(path: Path, run_id: str, check: Callable[[Path], list[Problem]]) -> Listed:
    problems: list[Problem] = []
    kind: Kind = next((kind for mark, kind in _MEANING.items() if path.name.startswith(mark) or path.name.endswith(mark)), "whole")
    digits = path.name.removesuffix(".tmp").rpartition("-")[2]
    step = int(digits) if digits.isdecimal() else None
    state = None
    if kind in ("whole", "superseded"):
        problems = check(path)
        if problems:
            missing = all(problem.code == "checkpoint.not-a-checkpoint" for problem in problems)
            kind = "foreign" if missing else "damaged"
        elif manifest.read(path).run_id != run_id:
            kind = "foreign"
    try:
        state = read_state(path / STATE)
    except CheckpointError as error:
        if kind == "whole":
            kind, problems = "damaged", list(error.problems)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Listed(path, kind, step, size, path.stat().st_mtime, state, problems)
