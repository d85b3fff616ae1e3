"""Summarizes one run from its files: settings, losses, evaluations, checkpoints, counts, time. No torch."""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llamahome.config.describe import settings
from llamahome.config.load import read_saved_config
from llamahome.errors import ConfigError
from llamahome.monitoring.alerts import is_alert
from llamahome.monitoring.display import RunSummary, metric_name, read_summary
from llamahome.monitoring.lineage import Ancestor, read_lineage
from llamahome.monitoring.readings import number
from llamahome.monitoring.runs import RunInfo, describe_run, numbers_of, read_records
from llamahome.rundir import RunPaths


@dataclass(frozen=True)
class Point:
    """A value at a step."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that `llamahome runs show`, `compare` and `report` show."""

    info: RunInfo
    changed_settings: dict[str, Any]
    """Dotted key -> value of each setting that is not at its default."""
    origins: dict[str, str]
    """Dotted key -> where its value came from, as config.yaml says; of every setting."""
    settings: dict[str, Any]
    """Dotted key -> value of every setting."""
    settings_problem: str | None
    """Why config.yaml could not be read."""
    summary: RunSummary | None
    """What was known before the first step; None for a run of an older version."""
    records: list[dict[str, float]]
    """Of metrics.jsonl, in order; a number that was not finite is nan."""
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
    event_records: list[dict[str, Any]]
    """Of events.jsonl, in order."""
    files: list[Path]
    damaged_lines: int
    """Of metrics.jsonl."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of training divided by the time in training steps."""
        return self.tokens / self.training_seconds if self.training_seconds else None

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """The events that are alerts."""
        return [event for event in self.event_records if is_alert(event)]

    @cached_property
    def best(self) -> Point | None:
        """The best evaluation by evaluation.metric, the earlier of equal ones: the lowest loss, or the highest of another metric."""
        metric = str(self.changed_settings.get("evaluation.metric", "loss"))
        name, sign = f"eval/{metric_name(metric)}", 1 if metric == "loss" else -1
        points = [Point(int(record["step"]), record[name]) for record in self.evaluations if name in record]
        return min((point for point in points if math.isfinite(point.value)), key=lambda point: sign * point.value, default=None)


def report_run(paths: RunPaths) -> RunReport:
    """Read all files of one run. A missing file leaves its fields empty."""
    metrics_file = paths.metrics_dir / "metrics.jsonl"
    read = read_records(metrics_file)
    series = [record for record in numbers_of(read.records) if math.isfinite(record.get("step", math.nan))]
    values, origins, problem = _settings(paths)
    happened = read_records(paths.metrics_dir / "events.jsonl").records
    events: dict[str, int] = {}
    for event in happened:
        kind = str(event.get("kind", event.get("event")))
        events[kind] = events.get(kind, 0) + 1
    steps = [record for record in series if "train/loss" in record]
    candidates = [paths.config, paths.environment, paths.root / "logs", paths.metrics_dir, paths.tensorboard_dir]
    return RunReport(
        info=describe_run(paths),
        changed_settings={key: value for key, value in values.items() if value != settings()[key].default},
        origins=origins,
        settings=values,
        settings_problem=problem,
        summary=read_summary(paths.metrics_dir),
        records=series,
        losses=[Point(int(record["step"]), record["train/loss"]) for record in steps],
        evaluations=[record for record in series if any(name.startswith("eval/") for name in record)],
        checkpoints=paths.checkpoints(),
        final=paths.final if paths.final.is_dir() else None,
        lineage=read_lineage(paths),
        tokens=_last_count(steps, "train/tokens"),
        targets=_last_count(steps, "train/targets"),
        training_seconds=_training_seconds(steps),
        events=events,
        event_records=happened,
        files=[path for path in candidates if path.exists()],
        damaged_lines=read.damaged,
    )


def _settings(paths: RunPaths) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """Values and origins of all settings, and why config.yaml could not be read: it may be from another version."""
    try:
        loaded = read_saved_config(paths.config)
    except ConfigError as error:
        return {}, {}, error.problems[0].message if error.problems else "cannot be read"
    values = {key: setting.of(loaded.config) for key, setting in settings().items()}
    return values, {key: origin.removeprefix("saved: ") for key, origin in loaded.origins.items()}, None


def _last_count(records: list[dict[str, float]], name: str) -> int:
    return int(number(records[-1].get(name)) or 0) if records else 0


def _training_seconds(steps: list[dict[str, float]]) -> float:
    """Sum tokens / tokens per second over the records, because the timestamps of a resumed run have gaps and its counts do not."""
    counts = [0.0, *(record.get("train/tokens", 0.0) for record in steps)]
    seconds = 0.0
    for (before, after), record in zip(itertools.pairwise(counts), steps, strict=True):
        speed = record.get("speed/tokens_per_s", 0.0)
        passed = (after - before) / speed if speed > 0 else 0.0
        seconds += passed if math.isfinite(passed) else 0.0
    return seconds
