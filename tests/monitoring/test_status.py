import threading
import time
from pathlib import Path

import pytest

from llamahome.durable import read_object
from llamahome.monitoring.sinks import DiskTrouble
from llamahome.monitoring.status import StatusFile


def heartbeats() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "llamahome-heartbeat"]


def test_the_heartbeat_continues_between_steps_and_ends_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run" / "status.json"
    file = StatusFile(path, trouble=DiskTrouble(pytest.fail), heartbeat=0.01)
    file.set("running", step=1, horizon=9, fields={})
    first = read_object(path)["t"]
    file.step(4)
    deadline = time.monotonic() + 10
    while read_object(path)["step"] != 4 or read_object(path)["t"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert heartbeats()
    file.set("stopped", step=4, horizon=9, fields={"reason": "SIGTERM"})
    assert not heartbeats()
    last = read_object(path)
    assert (last["state"], last["step"], last["reason"]) == ("stopped", 4, "SIGTERM")
    file.close()


def test_close_keeps_the_last_state_and_ends_the_thread(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "status.json", trouble=DiskTrouble(pytest.fail))
    file.set("running", step=1, horizon=9, fields={})
    file.close()
    assert not heartbeats()
    assert read_object(tmp_path / "status.json")["state"] == "running"


def test_a_relative_path_stays_where_it_was_when_the_working_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    file = StatusFile(Path("run/status.json"), trouble=DiskTrouble(pytest.fail))
    monkeypatch.chdir(tmp_path / "elsewhere")
    file.set("finished", step=9, horizon=9, fields={})
    assert read_object(tmp_path / "run/status.json")["state"] == "finished" and not list((tmp_path / "elsewhere").iterdir())


def test_a_missing_or_broken_status_is_empty(tmp_path: Path) -> None:
    assert read_object(tmp_path / "status.json") == {}
    (tmp_path / "status.json").write_text('{"state": "runn')
    assert read_object(tmp_path / "status.json") == {}
    (tmp_path / "status.json").write_text("[1]")
    assert read_object(tmp_path / "status.json") == {}


def test_a_folder_that_cannot_be_created_causes_one_warning(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    warnings: list[str] = []
    file = StatusFile(tmp_path / "logs/run/status.json", trouble=DiskTrouble(warnings.append))
    file.set("running", step=1, horizon=9, fields={})
    file.set("finished", step=9, horizon=9, fields={})
    assert len(warnings) == 1 and "cannot write" in warnings[0]
