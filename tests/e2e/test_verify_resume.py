"""`llamahome verify-resume` kills and resumes real processes, so these tests are slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.projects import Project
from tests.support.workers import worker_environment

pytestmark = pytest.mark.slow
FORGETS_THE_OPTIMIZER = """
import importlib.abc, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "llamahome.pipeline":
            sys.meta_path.remove(self)
            import llamahome.training.optimizer as optimizer
            optimizer.restore_optimizer = lambda *_, **__: None
        return None

sys.meta_path.insert(0, Finder())
"""


def _verify(project: Project, *words: str, more_path: str = "") -> subprocess.CompletedProcess[str]:
    environment = worker_environment()
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (more_path, environment.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "llamahome", "verify-resume", "chats.jsonl", *words]
    return subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "words",
    [("--max-steps", "9", "--output", "elsewhere/run"), ("--method", "full"), ("--world-size", "2")],
    ids=["lora", "full", "two processes"],
)
def test_a_killed_run_is_proved_to_go_on_bit_for_bit_and_nothing_stays(project: Project, words: tuple[str, ...]) -> None:
    before = {path.name for path in project.folder.iterdir()}
    done = _verify(project, "--json", "--epochs", "50", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["identical"] is True and result["first_difference"] is None and result["tensors"] > 20
    assert 0 < result["resumed_from"] <= result["killed_after"] < result["steps"]
    assert result["steps"] % (9 if "--max-steps" in words else 8) == 0
    assert {path.name for path in project.folder.iterdir()} <= before | {"output", "data", "elsewhere"}
    left = [path for name in ("output", "elsewhere") for path in (project.folder / name).glob("*")]
    assert left == [] and [*(project.folder / "data/metrics/logs").iterdir()] == []


def test_a_resume_that_forgets_the_optimizer_is_found(project: Project, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/sitecustomize.py").write_text(FORGETS_THE_OPTIMIZER)
    done = _verify(project, "--epochs", "50", more_path=str(tmp_path / "broken"))
    assert done.returncode == 7 and "error[checkpoint.resume-differs]" in done.stderr, done.stderr
    assert "two undisturbed runs differ" not in done.stderr


def test_a_run_that_fails_by_itself_is_shown_with_its_own_error(project: Project) -> None:
    done = _verify(project, "--set", "data.max_length=8", "--set", "data.on_overlong=drop")
    assert done.returncode == 3 and "error[data." in done.stderr
