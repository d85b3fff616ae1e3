"""The whole of doctor in a project: what passes on a sound machine, and that it changes nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.doctor import diagnose
from tests.support.models import save_tiny
from tests.support.projects import SETTINGS, chats, write_rows
from tests.support.sources import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "data/models/base/tiny")
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config/training_config.yaml").write_text(SETTINGS, encoding="utf-8")
    write_rows(tmp_path / "chats.jsonl", chats(24))
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_sound_machine_passes_every_check_and_nothing_is_left_behind(folder: Path) -> None:
    (folder / "tmp").mkdir()
    before = files(folder)
    found = diagnose(folder, "chats.jsonl", TMPDIR=str(folder / "tmp"))
    about_this_machine = {"memory-limit", "memory", "swap", "processors", "two-processes", "matrix-rate-cpu", "disk-rate-output"}
    assert found.of("FAIL") == set() and found.of("WARN") <= about_this_machine | {"disk-rate-cache", "memory-copy", "requirements-lock"}
    assert "2 steps of 4 rows of chats.jsonl" in found["two-steps"]["detail"] and "forward" in found["two-steps"]["detail"]
    assert files(folder) == before and not (folder / "output").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "said"),
    [("missing.jsonl", "missing.jsonl"), ("broken.jsonl", "broken.jsonl:1")],
)
def test_rows_that_cannot_be_read_fail_with_the_reason_of_train(rows: str, said: str, folder: Path) -> None:
    (folder / "broken.jsonl").write_text('{"messages": [\n' * 4)
    found = diagnose(folder, rows, "--only", "training")["two-steps"]
    assert found["status"] == "FAIL" and said in found["detail"], found


@pytest.mark.slow
def test_a_sound_run_needs_the_rows_of_no_launcher(folder: Path) -> None:
    """What an outer launcher has left does not make the steps wait for other processes."""
    found = diagnose(folder, "chats.jsonl", "--only", "training", RANK="1", WORLD_SIZE="4", MASTER_ADDR="10.0.0.9", MASTER_PORT="29400")
    assert found["two-steps"]["status"] == "PASS", found["two-steps"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_process_and_removes_the_files(
    folder: Path, own_processes: Callable[[int], list[int]], number: int, status: int
) -> None:
    command = [sys.executable, "-m", "llamahome", "doctor", "--only", "network", "--num-nodes", "2", "--node-rank", "0"]
    (folder / "tmp").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(folder / "tmp")}
    words = [*command, "--master-addr", "127.0.0.1", "--master-port", "29931"]
    process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (children := own_processes(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)  # until the process of the checks is watched
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status and list((folder / "tmp").iterdir()) == []
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.fixture
def own_processes() -> Callable[[int], list[int]]:
    def children(pid: int) -> list[int]:
        text = Path(f"/proc/{pid}/task/{pid}/children")
        return [int(word) for word in text.read_text().split()] if text.exists() else []

    return children
