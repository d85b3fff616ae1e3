"""How one run did, gathered from its files: settings, losses, evaluations, checkpoints, counts, time. No torch."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.config.describe import settings
from llamahome.config.load import read_saved_config
from llamahome.errors import ConfigError
from llamahome.monitoring.runs import RunInfo, describe_run, read_records, read_series
from llamahome.rundir import RunPaths


@dataclass(frozen=True)
class Point:
    """A value at a step."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that `llamahome runs show` tells."""

    info: RunInfo
    changed_settings: dict[str, Any]
    """Dotted key -> value, where it is not the default."""
    settings_problem: str | None
    """Why config.yaml could not be read."""
    losses: list[Point]
    evaluations: list[dict[str, float]]
    """Records with eval/ metrics, each with its step."""
    checkpoints: list[tuple[int, Path]]
    final: Path | None
    tokens: int
    targets: int
    training_seconds: float
    """Time in training steps, over resumes; without evaluating, saving and start-up."""
    events: dict[str, int]
    """How often each kind of event happened."""
    files: list[Path]
    damaged_lines: int

    @property
    def best(self) -> Point | None:
        """The lowest evaluation loss."""
        points = [Point(int(record["step"]), record["eval/loss"]) for record in self.evaluations if "eval/loss" in record]
        return min((point for point in points if math.isfinite(point.value)), key=lambda point: point.value, default=None)


def report_run(paths: RunPaths) -> RunReport:
    """Read all files of one run; what is not there is empty."""
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
        tokens=int(steps[-1].get("train/tokens", 0)) if steps else 0,
        targets=int(steps[-1].get("train/targets", 0)) if steps else 0,
        training_seconds=_training_seconds(steps),
        events=events,
        files=[path for path in candidates if path.exists()],
        damaged_lines=read_records(metrics_file).damaged,
    )


def _changed_settings(paths: RunPaths) -> tuple[dict[str, Any], str | None]:
    """Settings that are not at their default; a file of another version is told, not refused."""
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
    """Tokens divided by tokens per second, record by record: the clock of a resumed run has gaps, its counts have none."""
    counts = [0.0, *(record.get("train/tokens", 0.0) for record in steps)]
    seconds = 0.0
    for (before, after), record in zip(itertools.pairwise(counts), steps, strict=True):
        speed = record.get("speed/tokens_per_s", 0.0)
        seconds += (after - before) / speed if speed > 0 else 0.0
    return seconds
