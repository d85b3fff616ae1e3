"""Hands metrics to one tracker (trackio, W&B, MLflow), in a process of its own: `python -m llamahome.monitoring.tracker_process NAME`.

Reads JSON lines from stdin: first {"run", "folder", "settings"}, then {"step", "t", "metrics"}. The end of stdin is the end of the run,
also if the training was killed. An error of the tracker ends the process with a traceback; trackers.py reports its last line. Standard
library and the tracker's package only, so it starts fast.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CLOSING_SECONDS = 60
"""How long a tracker may take to send the rest after the end of a run that was killed; a run that ends waits less (trackers.py)."""

Log = Callable[[int, float, Mapping[str, float]], None]
Opened = tuple[Log, Callable[[], None]]
"""What logs a step, and what closes the run."""


def open_trackio(run: str, folder: Path, settings: Mapping[str, Any]) -> Opened:
    """Trackio: local, in its own database, unless its own variables say otherwise."""
    import trackio

    opened = trackio.init(
        project="llamahome", name=run, config=dict(settings), resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    return lambda step, t, metrics: opened.log(dict(metrics), step=step), opened.finish


def open_wandb(run: str, folder: Path, settings: Mapping[str, Any]) -> Opened:
    """W&B: WANDB_MODE=offline writes files only; its other variables choose the project and the account."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "llamahome")
    opened = wandb.init(project=project, name=run, id=run, dir=str(folder), config=dict(settings), resume="allow")
    return lambda step, t, metrics: opened.log(dict(metrics), step=step), opened.finish


def open_mlflow(run: str, folder: Path, settings: Mapping[str, Any]) -> Opened:
    """MLflow: in the folder `mlflow` beside the logs of the runs, unless MLFLOW_TRACKING_URI says otherwise."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri())
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "llamahome")
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment is not None else client.create_experiment(name)
    earlier = client.search_runs([number], f"tags.`llamahome.run` = '{run}'", max_results=1)
    if earlier:
        identity = earlier[0].info.run_id
        client.update_run(identity, status="RUNNING")
    else:
        identity = client.create_run(number, run_name=run, tags={"llamahome.run": run}).info.run_id
        client.log_batch(identity, params=[Param(key, str(value)[:500]) for key, value in settings.items()])

    def log(step: int, t: float, metrics: Mapping[str, float]) -> None:
        client.log_batch(identity, metrics=[Metric(name, value, int(t * 1000), step) for name, value in metrics.items()])

    return log, lambda: client.set_terminated(identity)


_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
"""The trackers' own reports about their use are off, unless the user has set these variables."""

OPENERS: Mapping[str, Callable[[str, Path, Mapping[str, Any]], Opened]] = {
    "trackio": open_trackio,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
}


def main(name: str) -> None:
    """Log what comes on stdin until it ends."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    first = json.loads(sys.stdin.readline())
    Path(first["folder"]).mkdir(parents=True, exist_ok=True)
    log, close = OPENERS[name](first["run"], Path(first["folder"]), first["settings"])
    for line in sys.stdin:
        record = json.loads(line)
        log(record["step"], record["t"], {name: float("nan") if value is None else value for name, value in record["metrics"].items()})
    signal.alarm(CLOSING_SECONDS)
    close()


if __name__ == "__main__":
    main(sys.argv[1])
