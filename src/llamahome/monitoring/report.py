"""Summarizes one run from its files: settings, losses, evaluations, checkpoints, counts, time. No torch."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.config.describe import settings
from llamahome.config.load import read_saved_config
from llamahome.errors import ConfigError
from llamahome.monitoring.display import metric_name
from llamahome.monitoring.lineage import Ancestor, read_lineage
from llamahome.monitoring.runs import RunInfo, describe_run, read_records, read_series
from llamahome.rundir import RunPaths


@dataclass(frozen=True)
class Point:
    """A value at a step."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that `llamahome runs show` shows."""

    info: RunInfo
    changed_settings: dict[str, Any]
    """Dotted key -> value of each setting that is not at its default."""
    settings_problem: str | None
    """Why config.yaml could not be read."""
    losses: list[Point]
    evaluations: list[dict[str, float]]
    """Records with eval/ metrics and their step."""
    checkpoints: list[tuple[int, Path]]
    final: Path | None
    lineage: list[Ancestor]
    """The adapters that the run began with, the nearest first."""
    tokens: int
    targets: int
    training_seconds: float
    """Time in training steps, over resumes; without evaluation, saving and start-up."""
    events: dict[str, int]
    """Count of each kind of event."""
    files: list[Path]
    damaged_lines: int

    @property
    def best(self) -> Point | None:
        """The best evaluation by evaluation.metric, the earlier of equal ones: the lowest loss, or the highest of another metric."""
        metric = str(self.changed_settings.get("evaluation.metric", "loss"))
        name, sign = f"eval/{metric_name(metric)}", 1 if metric == "loss" else -1
        points = [Point(int(record["step"]), record[name]) for record in self.evaluations if name in record]
        return min((point for point in points if math.isfinite(point.value)), key=lambda point: sign * point.value, default=None)


def report_run(paths: RunPaths) -> RunReport:
    """Read all files of one run. A missing file leaves its fields empty."""
    metrics_file = paths.metrics_dir / "metrics.jsonl"
    series = read_series(metrics_file)
    changed, problem = _changed_settings(paths)
    events: dict[str, int] = {}
    for event in read_records(paths.metrics_dir / "events.jsonl").records:
        events[str(event.get("kind"))] = events.get(str(event.get("kind")), 0) + 1
    steps = [record for record in series if "train/loss" in record and "step" in record]
    candidates = [paths.config, paths.environment, paths.root / "logs", paths.metrics_dir, paths.tensorboard_dir]
    return RunReport(
        info=describe_run(paths),
        changed_settings=changed,
        settings_problem=problem,
        losses=[Point(int(record["step"]), record["train/loss"]) for record in steps],
        evaluations=[record for record in series if "step" in record and any(name.startswith("eval/") for name in record)],
        checkpoints=paths.checkpoints(),
        final=paths.final if paths.final.is_dir() else None,
        lineage=read_lineage(paths),
        tokens=int(steps[-1].get("train/tokens", 0)) if steps else 0,
        targets=int(steps[-1].get("train/targets", 0)) if steps else 0,
        training_seconds=_training_seconds(steps),
        events=events,
        files=[path for path in candidates if path.exists()],
        damaged_lines=read_records(metrics_file).damaged,
    )


def _changed_settings(paths: RunPaths) -> tuple[dict[str, Any], str | None]:
    """The settings that are not at their default, and why config.yaml could not be read: it may be from another version."""
    try:
        config = read_saved_config(paths.config).config
    except ConfigError as error:
        return {}, error.problems[0].message if error.problems else "cannot be read"
    changed = {}
    for key, setting in settings().items():
        value = setting.of(config)
        if value != setting.default:
            changed[key] = value
    return changed, None


def _training_seconds(steps: list[dict[str, float]]) -> float:
    """Sum tokens / tokens per second over the records, because the timestamps of a resumed run have gaps and its counts do not."""
    counts = [0.0, *(record.get("train/tokens", 0.0) for record in steps)]
    seconds = 0.0
    for (before, after), record in zip(itertools.pairwise(counts), steps, strict=True):
        speed = record.get("speed/tokens_per_s", 0.0)
        seconds += (after - before) / speed if speed > 0 else 0.0
    return seconds
