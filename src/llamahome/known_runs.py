"""The runs of this project by their ids, and the shortest name of a run that works when it is typed here.

A run lies under output/runs, or where `--output` put it, and then status.json in the folder of its metrics says where. A project may be
copied or moved after that, so a run at the same place below this project comes before the place that was written down.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llamahome.durable import read_object
from llamahome.errors import Problem
from llamahome.rundir import METRICS, NEWEST, RUNS, RunPaths, as_typed, open_run, sweep_of


def is_run(folder: Path) -> bool:
    """Whether a run was begun in `folder`."""
    return (folder / "run_id").is_file() or (folder / "config.yaml").is_file()


def run_folders(root: Path = RUNS) -> list[Path]:
    """The folders of all runs, each once: those under `root`, the newest one, and those elsewhere that their metrics locate.

    Of two folders with one id, which a copy of a run's folder makes, the one that is named by the id comes first.
    """
    under = sorted(folder for folder in root.iterdir() if is_run(folder)) if root.is_dir() else []
    under.sort(key=lambda folder: open_run(folder).run_id != folder.name)
    newest = [NEWEST.resolve()] if is_run(NEWEST) else []
    known = {folder.name for folder in under}
    elsewhere = (_located(folder.name) for folder in sorted(METRICS.iterdir()) if folder.name not in known) if METRICS.is_dir() else ()
    found = [*under, *(folder for folder in elsewhere if folder is not None), *newest]
    unique: dict[Path, Path] = {}
    for folder in found:
        unique.setdefault(folder.resolve(), folder)
    return list(unique.values())


def known_runs(root: Path = RUNS) -> dict[str, Path]:
    """The folder of each run by its id, the oldest first, because an id begins with its date and time."""
    folders: dict[str, Path] = {}
    for folder in run_folders(root):
        folders.setdefault(open_run(folder).run_id, folder)
    return dict(sorted(folders.items()))


def newest_run(root: Path = RUNS) -> Path | None:
    """The run that `latest` means: the one that output/training points to, or else the last of those that are no trial of a sweep."""
    if is_run(NEWEST):
        return NEWEST
    return next((folder for folder in reversed(known_runs(root).values()) if sweep_of(folder) is None), None)


def runs_called(part: str, run_ids: Iterable[str]) -> list[str]:
    """Those of `run_ids` that are called `part` after their date and time, or if there are none, all that contain it.

    A number that tells runs of one second apart does not belong to the name.
    """
    ids = list(run_ids) if part else []
    called = re.compile(rf"\d{{8}}-\d{{6}}-{re.escape(part)}(-\d+)?")
    return [run_id for run_id in ids if called.fullmatch(run_id)] or [run_id for run_id in ids if part in run_id]


def ambiguous(part: str, run_ids: Sequence[str], *, hint: str) -> Problem:
    """The problem of a part that several `run_ids`, the oldest first, contain."""
    message = f"{len(run_ids)} run ids contain {part!r}" + ("; the newest ten are" if len(run_ids) > 10 else "")
    return Problem(code="run.ambiguous", message=message, where="RUN", excerpt="\n".join(run_ids[:-11:-1]), hint=hint)


def to_type(paths: RunPaths) -> str:
    """What names this run in a command that is typed here: its id if the project here knows it, or else its folder."""
    own, root = RUNS / paths.run_id, paths.root.resolve()
    known = own if is_run(own) else _located(paths.run_id)
    if known is not None and known.resolve() == root and not paths.run_id.startswith("-") and not Path(paths.run_id).exists():
        return shlex.quote(paths.run_id)
    return as_typed(paths.root)


def _located(run_id: str) -> Path | None:
    """Where the run is whose metrics are here: at the place of status.json below this project, or else at that place itself."""
    written = read_object(METRICS / run_id / "status.json").get("folder")
    if not isinstance(written, str):
        return None
    return next((folder for folder in _places(Path(written)) if is_run(folder) and open_run(folder).run_id == run_id), None)


def _places(written: Path) -> Iterator[Path]:
    """Of /old/project/mine/run: old/project/mine/run, project/mine/run, mine/run and run below the working folder; then the path itself."""
    for first in range(1, len(written.parts)):
        yield Path(*written.parts[first:])
    yield written
