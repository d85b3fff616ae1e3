"""A process is killed at any instant while it records: every file reads to its last whole line, and a resume doubles and loses no step.

A child process (fork) trains nothing: it records steps as fast as it can, notes every tenth as its checkpoint, and resumes from the last
note. What is after the note was not saved and is recorded again.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WRITER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from llamahome import durable
from llamahome.monitoring.recorder import Recorder

torch.set_num_threads(1)
folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
note, metrics = folder / "checkpoint", folder / "metrics.jsonl"


def record_forever():
    step = int(note.read_text()) if note.exists() else 0
    resume = step if metrics.exists() else None
    recorder = Recorder(folder, tensorboard_dir=None, is_main=True, resume_step=resume, flops_per_token=1.0, peak_flops=None, warn=print)
    recorder.event("resumed", step=step)
    recorder.status("running", step, 10**9)
    while True:
        step += 1
        recorder.record(step, loss=torch.tensor(float(step)), grad_norm=torch.tensor(1.0), learning_rate=0.1, tokens=10, targets=5)
        recorder.write(recorder.cut(step), {"forward": 0.1})
        if step % 10 == 0:
            recorder.sample(step, "prompt", "answer " * 50, "reference")
            durable.write_whole(note, str(step), flush=False)


def size():
    return metrics.stat().st_size if metrics.exists() else 0


for kill in range(kills):
    pid = os.fork()
    if not pid:
        try:
            record_forever()
        finally:
            os._exit(1)
    if kill % 3:  # while it records; the others at any time, so while it resumes too
        goal = size() + chance.randrange(4000)
        while size() < goal:
            time.sleep(0.0005)
    time.sleep(chance.uniform(0.0, 0.03))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the child ended by itself"
    print("killed", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.medium
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_at_any_instant_leaves_whole_lines_and_a_resume_doubles_and_loses_no_step(tmp_path: Path, kills: int) -> None:
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    folder = tmp_path / "run"
    folder.mkdir()
    reached = 0
    with subprocess.Popen(
        [sys.executable, str(script), str(folder), str(kills), "7"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        for _ in range(kills):
            assert writer.stdout.readline() == "killed\n"
            reached = max(reached, check(folder))
            writer.stdin.write("\n")
            writer.stdin.flush()
    assert writer.returncode == 0
    assert reached > 2 * kills, "steps were recorded between the kills"


def check(folder: Path) -> int:
    """Every whole line parses; the steps in metrics.jsonl follow each other from 1 on; returns the last one."""
    for name in ("metrics", "events", "samples", "superseded"):
        path = folder / f"{name}.jsonl"
        if path.exists():
            *whole, torn = path.read_bytes().split(b"\n")
            assert all(isinstance(json.loads(line), dict) for line in whole), name
            assert torn == b"" or not torn.endswith(b"}") or json.loads(torn)
    status = folder / "status.json"
    if status.exists():
        assert json.loads(status.read_text())["state"] == "running"
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return 0
    records = [json.loads(line) for line in metrics.read_bytes().split(b"\n")[:-1]]
    steps = [record["step"] for record in records]
    assert steps == list(range(1, len(steps) + 1))
    assert all(record["train/loss"] == record["step"] for record in records)
    saved = int((folder / "checkpoint").read_text()) if (folder / "checkpoint").exists() else 0
    assert len(steps) >= saved, "no step before the checkpoint is lost"
    return len(steps)
