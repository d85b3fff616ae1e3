"""summary.json: what was known about a run before its first step, for those who look at it later or from elsewhere. No torch."""

import json
from dataclasses import asdict
from pathlib import Path

from llamahome import durable
from llamahome.monitoring.display import RunSummary

NAME = "summary.json"


def write_summary(metrics_dir: Path, summary: RunSummary) -> None:
    """Write it beside metrics.jsonl. Raises OSError."""
    metrics_dir.mkdir(parents=True, exist_ok=True)
    durable.write_whole(metrics_dir / NAME, json.dumps(asdict(summary)) + "\n", flush=False)


def read_summary(metrics_dir: Path) -> RunSummary | None:
    """What `write_summary` wrote; None for a run of an older version, or one that has not begun to train."""
    try:
        return RunSummary(**json.loads((metrics_dir / NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
