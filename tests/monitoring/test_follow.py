"""`runs tail`: shows a run from its files as the run itself does, tells how it ended, and never touches it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.support.written_runs import BEGAN, append_line, evaluation_of, metrics_of, summary_of, write_run, write_status

from llamahome.monitoring.alerts import alert_fields
from llamahome.monitoring.display import write_summary
from llamahome.monitoring.episodes import Alert
from llamahome.monitoring.follow import Follower, ViewClock
from llamahome.monitoring.panel import PanelProgress
from llamahome.monitoring.plain import PlainProgress
from llamahome.monitoring.runs import describe_run
from llamahome.rundir import RunPaths


@pytest.fixture(autouse=True)
def change_to_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Watched:
    """A follower that writes lines, and what it has written since the last time."""

    def __init__(self, paths: RunPaths) -> None:
        self._stream = StringIO()
        self.follower = Follower(paths, lambda clock: PlainProgress(self._stream, now=clock), plain=True)

    def poll(self) -> str:
        self.follower.poll()
        return self.new()

    def new(self) -> str:
        text = self._stream.getvalue()
        self._stream.seek(0)
        self._stream.truncate()
        return text


def values_of(line: str) -> dict[str, str]:
    return dict(pair.partition("=")[::2] for pair in line.split() if "=" in pair)


def ended(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a follower prints at the end of a run that is over already."""
    watched = Watched(paths)
    info = watched.follower.poll()
    assert watched.follower.is_over(info)
    watched.follower.finish(info)
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a training."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as sleeping:
        yield sleeping
        sleeping.kill()


def test_of_a_long_past_two_lines_are_shown_with_the_times_of_the_run() -> None:
    paths = write_run(steps=400, horizon=500, state="running")
    lines = [line for line in Watched(paths).poll().splitlines() if line.startswith("step=")]
    assert len(lines) == 2
    last = values_of(lines[-1])
    assert (last["step"], last["loss"], last["eval_step"]) == ("400/500", "1.5000", "400")
    assert (last["elapsed"], last["left"]) == ("13:20", "3:20"), "2 s a step since the run began, 100 steps to go"


def test_new_records_are_shown_and_half_a_line_waits_for_its_end() -> None:
    paths = write_run(steps=4, horizon=100, state="running")
    file = paths.metrics_dir / "metrics.jsonl"
    watched = Watched(paths)
    watched.poll()
    line = json.dumps({**metrics_of(12), "train/loss": 0.25}) + "\n"
    with file.open("a") as out:
        out.write(line[:40])
    assert watched.poll() == ""
    with file.open("a") as out:
        out.write(line[40:])
    assert values_of(watched.poll())["loss"] == "0.2500"
    append_line(file, evaluation_of(12, 1.25))
    append_line(file, metrics_of(24))
    shown = values_of(watched.poll())
    assert (shown["step"], shown["eval_step"], shown["eval_loss"]) == ("24/100", "12", "1.2500")


def test_a_run_that_was_resumed_is_shown_anew() -> None:
    paths = write_run(steps=40, horizon=100, state="running")
    watched = Watched(paths)
    watched.poll()
    file = paths.metrics_dir / "metrics.jsonl"
    kept = file.with_name("kept")
    kept.write_text("".join(file.read_text().splitlines(keepends=True)[:20]))
    kept.replace(file)
    write_summary(paths.metrics_dir, summary_of(paths.run_id, steps=300))
    append_line(paths.metrics_dir / "events.jsonl", {"t": metrics_of(900)["t"], "kind": "resumed", "step": 17, "horizon": 300})
    append_line(file, {**metrics_of(900), "step": 18})
    text = watched.poll()
    assert "model: tiny" in text
    assert values_of(text.splitlines()[-1])["step"] == "18/300"


def test_a_run_that_has_not_begun_to_train_is_waited_for() -> None:
    paths = write_run(steps=4, horizon=8, state="running")
    summary, metrics = paths.metrics_dir / "summary.json", paths.metrics_dir / "metrics.jsonl"
    saved = metrics.read_text()
    (paths.metrics_dir / "events.jsonl").unlink()
    metrics.unlink()
    summary.unlink()
    watched = Watched(paths)
    assert watched.poll() == ""
    assert not watched.follower.is_over(describe_run(paths))
    metrics.write_text(saved)
    write_summary(paths.metrics_dir, summary_of(paths.run_id, steps=8))
    assert "step=4/8" in watched.poll()


def test_a_run_of_an_older_version_is_shown_without_what_it_did_not_write() -> None:
    paths = write_run(steps=4, horizon=8, state="running")
    for name in ("summary.json", "events.jsonl"):
        (paths.metrics_dir / name).unlink()
    text = Watched(paths).poll()
    assert "model: tiny, lora\n" in text and "data:" not in text
    assert values_of(text.splitlines()[-1])["step"] == "4/8"


def test_alerts_are_shown_with_their_advice() -> None:
    paths = write_run(steps=4, horizon=8, state="running")
    watched = Watched(paths)
    watched.poll()
    alert = alert_fields(Alert(name="loss-spike", step=4, text="the loss rose", help="look at row 7"), rows=dict)
    append_line(paths.metrics_dir / "events.jsonl", {"kind": "alert", **alert})
    assert watched.poll() == "alert: step 4: the loss rose; look at row 7\n"


def test_a_run_whose_clock_was_set_back_is_shown_from_its_last_beginning_on() -> None:
    paths = write_run(steps=8, horizon=8, state="running")
    metrics, events = paths.metrics_dir / "metrics.jsonl", paths.metrics_dir / "events.jsonl"
    append_line(events, {"t": BEGAN + 10**6, "kind": "resumed", "step": 4})
    for record in (json.loads(line) for line in metrics.read_text().splitlines()):
        assert record["t"] < BEGAN + 10**6
    text = Watched(paths).poll()
    assert "step=8/8" in text and not any(f"step={step}/8" in text for step in range(1, 5))


def test_a_run_that_is_deleted_while_it_is_watched_is_called_gone(capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_run(steps=4, horizon=8, state="running")
    watched = Watched(paths)
    watched.poll()
    shutil.rmtree(paths.root)
    shutil.rmtree(paths.metrics_dir)
    info = watched.follower.poll()
    assert watched.follower.is_over(info)
    watched.follower.finish(info)
    assert capsys.readouterr().out.splitlines()[0] == f"{paths.run_id} is gone: there is no folder output/runs/{paths.run_id} any more"


def test_after_a_crash_the_process_the_time_and_the_command_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_run(steps=40, horizon=100)
    write_status(paths, "running", 40, 100, pid=2**22, host="node-7", t=metrics_of(40)["t"])
    said = ended(paths, capsys)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(metrics_of(40)["t"]))
    assert said[0] == f"{paths.run_id}: the process 4194304 on node-7 is gone; its last sign was at {when}, after step 40"
    assert said[1] == f"to go on from checkpoint-40: llamahome train-resume output/runs/{paths.run_id}"


def test_without_a_checkpoint_the_command_that_started_the_run_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_run(steps=3, horizon=100, state="failed", checkpoint=False)
    assert ended(paths, capsys)[-1] == "no checkpoint was saved; it was started with: llamahome train 'my chats.jsonl'"


@pytest.mark.parametrize(("state", "words"), [("finished", "finished at"), ("stopped", "was stopped at"), ("failed", "failed at")])
def test_a_run_that_has_ended_is_shown_with_its_end(state: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in ended(write_run(state=state), capsys)[0]


def test_damaged_lines_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_run()
    file = paths.metrics_dir / "metrics.jsonl"
    file.write_bytes(b"\x00\xff\n[1, 2]\n" + file.read_bytes())
    assert ended(paths, capsys)[0] == "2 lines of its files cannot be read and are left out"


def test_a_process_that_dies_while_it_is_watched_may_be_started_again(process: subprocess.Popen[bytes]) -> None:
    paths = write_run(steps=4, horizon=8)
    write_status(paths, "running", 4, 8, pid=process.pid)
    watched = Watched(paths)
    assert not watched.follower.is_over(watched.follower.poll())
    process.kill()
    process.wait()
    info = watched.follower.poll()
    assert info.state == "lost" and not watched.follower.is_over(info)
    write_status(paths, "running", 4, 8, pid=process.pid, t=time.time() - 31)
    assert watched.follower.is_over(watched.follower.poll())


def test_the_panel_shows_the_whole_course_at_the_time_of_the_run() -> None:
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=110, color_system=None)

    def open_panel(clock: ViewClock) -> PanelProgress:
        return PanelProgress(stream, console=console, now=clock, hints=[("leave", "Ctrl-C closes this view")])

    follower = Follower(write_run(steps=100, state="finished"), open_panel, plain=False)
    follower.poll()
    follower.close()
    last = stream.getvalue().rpartition("╭")[2]
    for shown in ("step 100 of 100, 3:20 elapsed", "held-out 2.3000 at step 100", "newest checkpoint-100", "Ctrl-C closes this view"):
        assert shown in last, last
    assert "saves a checkpoint" not in last


def tail(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llamahome", "runs", "tail", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def test_ctrl_c_leaves_the_run_alone(process: subprocess.Popen[bytes]) -> None:
    paths = write_run(steps=4, horizon=8)
    write_status(paths, "running", 4, 8, pid=process.pid)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with tail() as watching:
        assert watching.stdout is not None
        while "step=4/8" not in watching.stdout.readline():
            pass
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=30)
    assert watching.returncode == 0 and "left alone" in said and "Traceback" not in said
    assert process.poll() is None
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_tail_ends_with_the_run_and_as_json_gives_every_record(process: subprocess.Popen[bytes]) -> None:
    paths = write_run(steps=4, horizon=8)
    write_status(paths, "running", 4, 8, pid=process.pid)
    with tail("latest", "--json") as watching:
        assert watching.stdout is not None
        first = [json.loads(watching.stdout.readline()) for _ in range(10)]
        append_line(paths.metrics_dir / "metrics.jsonl", metrics_of(8))
        write_status(paths, "finished", 8, 8)
        out, said = watching.communicate(timeout=30)
    assert watching.returncode == 0, said
    rest: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert [record["kind"] for record in first[:3]] == ["started", "saved", "metrics"]
    steps = [record.get("step") for record in rest]
    assert steps[-2:] == [8, 8] and set(steps[:-2]) <= {4}, "one more record of the state at step 4 may come before"
    assert rest[-1] == {"kind": "state", "state": "finished", "step": 8, "horizon": 8}
