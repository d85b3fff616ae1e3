"""A tracker gets every metric; one that raises, ends or hangs is reported once, and the run goes on. Real packages: marked slow."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from llamahome.config.quantities import TRACKERS
from llamahome.errors import MachineError
from llamahome.monitoring.tracker_process import OPENERS
from llamahome.monitoring.trackers import TrackerSink, require_installed

FACTS = {"run": "brisk-otter", "folder": "out", "settings": {"training.epochs": 3}}
KEEP = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
METRICS = {"train/loss": 2.5, "speed/mfu": float("nan")}


class Clock:
    """Moves a second with each reading, so that a hang needs no waiting."""

    def __init__(self, pace: float) -> None:
        self.seconds, self.pace = 0.0, pace

    def __call__(self) -> float:
        self.seconds += self.pace
        return self.seconds


def open_sink(tmp_path: Path, code: str, warn: Callable[[str], None] = pytest.fail, *arguments: str, **options: Any) -> TrackerSink:
    command = [sys.executable, "-S", "-c", code, *arguments]
    return TrackerSink("wandb", tmp_path / "logs/tracker-wandb.log", FACTS, warn=warn, command=command, **options)


def test_the_settings_name_the_trackers_that_there_are() -> None:
    assert set(TRACKERS) == set(OPENERS)


def test_a_tracker_gets_every_line_in_order_and_the_end(tmp_path: Path) -> None:
    sink = open_sink(tmp_path, KEEP, pytest.fail, str(tmp_path / "kept"))
    for step in range(500):
        sink.log(step, 1.5, METRICS)
    sink.close()
    first, *lines = map(json.loads, (tmp_path / "kept").read_text().splitlines())
    assert first == FACTS
    assert lines == [{"step": step, "t": 1.5, "metrics": {"train/loss": 2.5, "speed/mfu": None}} for step in range(500)]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit(1)", "has ended"),
        ("import sys; sys.stdin.readline(); raise ValueError('no such project: x')", "ValueError: no such project: x"),
        ("import sys; sys.stdin.read(); raise ValueError('cannot close')", "ended with status 1: ValueError: cannot close"),
    ],
)
def test_a_tracker_that_raises_is_reported_once_with_its_last_words(tmp_path: Path, code: str, words: str) -> None:
    told: list[str] = []
    sink = open_sink(tmp_path, code, told.append)
    for step in range(300):
        sink.log(step, 1.5, METRICS)
        if told:
            break
        time.sleep(0.01)
    for step in range(300, 400):
        sink.log(step, 1.5, METRICS)
    sink.close()
    assert len(told) == 1
    assert words in told[0] and "the training goes on without it" in told[0]


def test_a_tracker_that_hangs_is_left_after_thirty_seconds_and_killed(tmp_path: Path) -> None:
    told: list[str] = []
    before = {child.pid for child in psutil.Process().children()}
    sink = open_sink(tmp_path, "import time; time.sleep(600)", told.append, now=Clock(0.01))
    (hanging,) = {child.pid for child in psutil.Process().children()} - before
    count = 0
    while not told and count < 20_000:
        count += 1
        sink.log(count, 1.5, {f"metric/{number}": 0.5 for number in range(2000)})
    assert len(told) == 1 and "has taken nothing for" in told[0]
    assert not psutil.pid_exists(hanging)
    sink.log(count, 1.5, METRICS)
    sink.close()
    assert len(told) == 1


def test_a_tracker_that_does_not_close_is_killed_when_its_time_is_up(tmp_path: Path) -> None:
    told: list[str] = []
    sink = open_sink(tmp_path, "import sys, time; sys.stdin.read(); time.sleep(600)", told.append, closing=0.5)
    sink.log(1, 1.5, METRICS)
    sink.close()
    assert len(told) == 1 and "did not close its run within 0.5 s" in told[0]


def test_a_tracker_that_cannot_be_started_is_reported(tmp_path: Path) -> None:
    told: list[str] = []
    sink = TrackerSink("wandb", tmp_path / "log", FACTS, warn=told.append, command=["/nowhere/python"])
    sink.log(1, 1.5, METRICS)
    sink.close()
    assert len(told) == 1 and "cannot be started" in told[0]


def test_a_missing_package_is_refused_with_what_installs_it() -> None:
    require_installed([])
    with pytest.raises(MachineError) as refused:
        require_installed(["wandb", "mlflow"], installed=lambda name: None if name == "mlflow" else object())
    (problem,) = refused.value.problems
    assert (problem.code, problem.hint) == ("machine.no-tracker", "pip install 'llamahome[mlflow]'")


PACKAGES = {"trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow-skinny"}
# The files of W&B are in the log format of LevelDB: blocks of 32 KiB, records with a header of 7 bytes, after a file header of 7 bytes.
READ = {
    "trackio": """
import sqlite3, json, glob, os
rows = sqlite3.connect(glob.glob(os.environ["TRACKIO_DIR"] + "/*.db")[0]).execute("select step, metrics from metrics order by id")
print(json.dumps([[step, json.loads(text)["train/loss"]] for step, text in rows]))
""",
    "wandb": """
import glob, json, struct
from wandb.proto import wandb_internal_pb2
data = open(glob.glob("out/wandb/offline-run-*/*.wandb")[0], "rb").read()
place, whole, found = 7, b"", []
while place + 7 <= len(data):
    if 32768 - place % 32768 < 7:
        place += 32768 - place % 32768
        continue
    _, size, kind = struct.unpack("<IHB", data[place : place + 7])
    whole += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):
        record, whole = wandb_internal_pb2.Record.FromString(whole), b""
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append([items["_step"], items["train/loss"]])
print(json.dumps(found))
""",
    "mlflow": """
import json, os
from pathlib import Path
from mlflow.tracking import MlflowClient
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
client = MlflowClient(Path("out/mlflow").resolve().as_uri())
runs = client.search_runs([client.get_experiment_by_name("llamahome").experiment_id])
assert len(runs) == 1 and runs[0].data.params["training.epochs"] == "3", runs
assert runs[0].info.status == "FINISHED"
print(json.dumps([[m.step, m.value] for m in client.get_metric_history(runs[0].info.run_id, "train/loss")]))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACKERS)
def test_the_real_tracker_holds_what_was_logged_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker_python: Callable[[str], str], name: str
) -> None:
    python = tracker_python(PACKAGES[name])
    monkeypatch.chdir(tmp_path)
    source = str(Path(__file__).resolve().parents[2] / "src")
    for variable, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": source}.items():
        monkeypatch.setenv(variable, value)
    told: list[str] = []
    for first in (1, 4):
        command = [python, "-P", "-m", "llamahome.monitoring.tracker_process", name]
        sink = TrackerSink(name, tmp_path / "log", FACTS, warn=told.append, command=command, closing=240)
        for step in range(first, first + 3):
            sink.log(step, 1.7e9 + step, {"train/loss": step + 0.25, "speed/mfu": float("nan")})
        sink.close()
        assert told == [], (tmp_path / "log").read_text()
        if name == "wandb":  # a resumed run is one file of its own offline
            break
    expected = [[step, step + 0.25] for step in range(1, 4 if name == "wandb" else 7)]
    read = subprocess.run([python, "-c", READ[name]], capture_output=True, text=True, check=False, env={**os.environ})
    assert read.returncode == 0, read.stderr
    assert json.loads(read.stdout.splitlines()[-1]) == expected


@pytest.fixture(scope="module")
def tracker_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A Python of its own with a package from the registry; skips where pip cannot install it."""
    venv = tmp_path_factory.mktemp("trackers") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)

    def install(package: str) -> str:
        done = subprocess.run(
            [str(venv / "bin/python"), "-E", "-m", "pip", "install", "-q", package], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"pip cannot install {package} here: {done.stderr.splitlines()[-1:]}")
        return str(venv / "bin/python")

    return install
