"""monitoring.notify with real commands: slow ones, failing ones, ones that fork; none of them stops or slows a run."""

import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.processes import alive

from llamahome.monitoring.notify import Notifier


def notifier(command: str, warn: Callable[[str], None] = pytest.fail, *, longest: float = 10.0, **environ: str) -> Notifier:
    return Notifier(command, run="brisk-otter", warn=warn, longest=longest, environ={"PATH": os.environ["PATH"], **environ})


def pids(path: Path, count: int) -> list[int]:
    """The process ids that a command has written, once there are `count` of them."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = path.read_text().split() if path.exists() else []
        if len(found) == count:
            return [int(pid) for pid in found]
        time.sleep(0.01)
    raise AssertionError(found)


def test_the_facts_come_as_variables_and_as_json(tmp_path: Path) -> None:
    out = shlex.quote(str(tmp_path))
    sender = notifier(f'cat > {out}/stdin; echo "$LLAMAHOME_EVENT|$LLAMAHOME_RUN|$LLAMAHOME_STEP|$LLAMAHOME_TEXT" > {out}/variables')
    sender.event("alert", {"step": 70, "alert": "loss-spike", "text": 'the loss jumped to 9.1; it\'s "high" $HOME', "help": "try less"})
    sender.close()
    assert (tmp_path / "variables").read_text() == 'alert|brisk-otter|70|the loss jumped to 9.1; it\'s "high" $HOME\n'
    assert json.loads((tmp_path / "stdin").read_text()) == {
        "event": "alert",
        "run": "brisk-otter",
        "step": 70,
        "alert": "loss-spike",
        "text": 'the loss jumped to 9.1; it\'s "high" $HOME',
        "help": "try less",
    }


@pytest.mark.parametrize(("kind", "sent"), [("finished", 1), ("stopped", 1), ("failed", 1), ("alert", 1), ("saved", 0), ("started", 0)])
def test_the_command_runs_at_the_end_on_failure_and_on_an_alert_only(tmp_path: Path, kind: str, sent: int) -> None:
    sender = notifier(f"echo $LLAMAHOME_EVENT >> {shlex.quote(str(tmp_path / 'events'))}")
    sender.event(kind, {"step": 3})
    sender.close()
    assert (tmp_path / "events").exists() == bool(sent)


def test_no_secret_of_the_training_reaches_the_command(tmp_path: Path) -> None:
    secrets = {
        "HF_TOKEN": "hf_x",
        "WANDB_API_KEY": "w",
        "AWS_SECRET_ACCESS_KEY": "a",
        "DATABASE_URL": "postgres://u:p@h",
        "LANG": "C.UTF-8",
    }
    sender = notifier(f"env > {shlex.quote(str(tmp_path / 'env'))}", **secrets)
    sender.event("finished", {"step": 3})
    sender.close()
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH", "LANG", *(f"LLAMAHOME_{name}" for name in ("EVENT", "RUN", "STEP", "TEXT"))}


@pytest.mark.medium
def test_a_slow_command_does_not_slow_the_run_and_is_killed_with_its_children(tmp_path: Path) -> None:
    told: list[str] = []
    file = shlex.quote(str(tmp_path / "pids"))
    command = f"sleep 600 & echo $! >> {file}; setsid sleep 601 & echo $! >> {file}; echo $$ >> {file}; wait"
    sender = notifier(command, told.append, longest=1.5)
    before = time.monotonic()
    sender.event("alert", {"step": 1, "text": "slow"})
    returned = time.monotonic() - before
    processes = pids(tmp_path / "pids", 3)
    sender.close()
    assert returned < 1, "the training goes on at once"
    assert [pid for pid in processes if alive(pid, within=30)] == []
    assert told == ["the command of monitoring.notify took longer than 1.5 s and was killed; the training goes on, and this is said once"]


def test_what_a_command_leaves_in_the_background_ends_with_it(tmp_path: Path) -> None:
    file = shlex.quote(str(tmp_path / "pids"))
    sender = notifier(f"sleep 600 >/dev/null 2>&1 & echo $! > {file}")
    sender.event("finished", {"step": 1})
    sender.close()
    assert not alive(pids(tmp_path / "pids", 1)[0], within=30)


def test_a_failing_command_is_told_once_with_its_last_words() -> None:
    told: list[str] = []
    sender = notifier("cat > /dev/null; echo first; echo 'no such channel: #runs' >&2; exit 3", told.append)
    for step in range(3):
        sender.event("alert", {"step": step, "text": "something"})
        sender.close()
    assert len(told) == 1
    assert "failed with status 3: no such channel: #runs" in told[0]


@pytest.mark.parametrize("command", ["exit 0", "exec 0<&-", "head -c 2000000 /dev/zero"])
def test_a_command_may_ignore_its_input_and_say_much(command: str) -> None:
    sender = notifier(command)
    sender.event("alert", {"step": 1, "text": "x\0\udc80" * 200_000})
    sender.close()


def test_a_flood_of_alerts_starts_only_a_few_commands(tmp_path: Path) -> None:
    told: list[str] = []
    sender = notifier(f"echo started >> {shlex.quote(str(tmp_path / 'log'))}; sleep 600", told.append, longest=1.0)
    for step in range(50):
        sender.event("alert", {"step": step, "text": f"alert {step}"})
    sender.close()
    assert len((tmp_path / "log").read_text().split()) == 4
    assert len(told) == 1


def test_a_command_that_cannot_be_started_is_told_and_nothing_is_raised() -> None:
    told: list[str] = []
    sender = notifier("true\0", told.append)
    sender.event("finished", {"step": 1})
    sender.close()
    assert len(told) == 1
