"""summary.json: what was known about a run before its first step, for those who look at it later or from elsewhere. No torch."""

import json
from dataclasses import asdict, fields
from pathlib import Path

from llamahome import durable
from llamahome.monitoring.display import RunSummary
from llamahome.monitoring.readings import number, whole

NAME = "summary.json"


def write_summary(metrics_dir: Path, summary: RunSummary) -> None:
    """Write it beside metrics.jsonl. Raises OSError."""
    metrics_dir.mkdir(parents=True, exist_ok=True)
    durable.write_whole(metrics_dir / NAME, json.dumps(asdict(summary)) + "\n", flush=False)


def read_summary(metrics_dir: Path) -> RunSummary | None:
    """What `write_summary` wrote; None for a run of an older version or one that has not begun to train, and if it cannot be used."""
    try:
        found = RunSummary(**json.loads((metrics_dir / NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.horizon and all(_fits(field.type, getattr(found, field.name)) for field in fields(found)) else None


def _fits(kind: object, value: object) -> bool:
    """Whether the value of a field of this type can be computed with and shown."""
    if kind in (int, float):
        return (whole(value) if kind is int else number(value)) is not None
    if kind is str:
        return isinstance(value, str)
    return value is None or (isinstance(value, dict) and all(whole(size) is not None for size in value.values()))
