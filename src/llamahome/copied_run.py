"""A copy of a run's folder becomes a run of its own when it is resumed; a folder that was moved stays the run that it was.

The copy has the id of its original, and so the same folders under data/metrics. status.json there names the folder that wrote it: if that
is another one which still holds the run, the folder at hand is a copy. The new id is written last, so that a kill changes nothing.
"""

import json
import shutil
from pathlib import Path

from llamahome import durable
from llamahome.checkpoint import manifest
from llamahome.durable import read_object
from llamahome.monitoring.sinks import supersede_after
from llamahome.rundir import RunPaths, rename_run, writing

_SUPERSEDED, _STATUS = "superseded.jsonl", "status.json"
_STEPS = ("metrics.jsonl", "samples.jsonl", "events.jsonl")


def original_of(paths: RunPaths) -> Path | None:
    """The folder that the run in `paths` was copied from and whose metrics it would write into; None if it is no such copy."""
    named = read_object(paths.metrics_dir / _STATUS).get("folder")
    original = Path(named) if isinstance(named, str) else paths.root
    try:
        holds_it = (original / "run_id").read_text(encoding="utf-8").strip() == paths.run_id
        copied = holds_it and not original.samefile(paths.root)
    except (OSError, ValueError):
        return None
    return original if copied and not _has_own_metrics(original, paths) else None


def _has_own_metrics(original: Path, paths: RunPaths) -> bool:
    """Whether the whole project was copied, and the metrics with it."""
    theirs = RunPaths(original, paths.run_id).metrics_dir
    return theirs.is_dir() and not theirs.samefile(paths.metrics_dir)


def with_own_id(paths: RunPaths, step: int) -> RunPaths:
    """Give the copy in `paths` an id, its checkpoints and copies of the records up to `step`. Called by one process."""
    with writing(paths.root):
        own = rename_run(paths)
        if paths.metrics_dir.is_dir():
            _copy_records(paths.metrics_dir, own.metrics_dir, step)
        if paths.tensorboard_dir.is_dir():  # the events of later steps are hidden as at any resume
            shutil.copytree(paths.tensorboard_dir, own.tensorboard_dir)
        for folder in paths.root.glob("*checkpoint-*"):
            manifest.hand_over(folder, paths.run_id, own.run_id)
        own.write_id()
    return own


def _copy_records(source: Path, target: Path, step: int) -> None:
    """Copy the records of a run, without those after `step`: the original may have gone on since."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(_STATUS, _SUPERSEDED))
    supersede_after(target, step, names=_STEPS)
    (target / _SUPERSEDED).unlink(missing_ok=True)
    if (source / _SUPERSEDED).is_file():
        shutil.copy2(source / _SUPERSEDED, target)
    until = _last_time(target / _STEPS[0])
    for path in target.glob("system*.jsonl"):
        with durable.replacing(path) as kept, path.open("rb") as lines:
            kept.writelines(line for line in lines if _time_of(line) <= until)


def _last_time(path: Path) -> float:
    """When the last of these records was made; 0 without any."""
    if not path.is_file():
        return 0.0
    with path.open("rb") as lines:
        return max(map(_time_of, lines), default=0.0)


def _time_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["t"])
    except (ValueError, TypeError, KeyError):
        return 0.0
