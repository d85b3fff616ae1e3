"""docs/Doctor.md: it names every check that there is, and its commands run as they stand."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.doctor.test_whole import folder  # noqa: F401
from tests.support.sources import ROOT, SOURCES, source

PAGE = (ROOT / "docs/Doctor.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]


def names() -> set[str]:
    """Names of checks that stand in the source as they are."""
    found = set()
    for name in SOURCES:
        if name.startswith("doctor/"):
            calls = [node for node in ast.walk(source(name)) if isinstance(node, ast.Call) and node.args]
            makers = [call for call in calls if getattr(call.func, "id", "") in ("passed", "warned", "failed", "of_problems", "Purpose")]
            found |= {call.args[0].value for call in makers if isinstance(call.args[0], ast.Constant)}
    return found


def test_every_check_has_a_sentence() -> None:
    rows = re.findall(r"^\| (`.*?) \| (?:Is|Are|Do|Does|How|Can|Which|Have)\b.*\? ?(?:\(`--network`\) )?\|$", PAGE, flags=re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row)}
    assert len(names()) > 30 and names() <= listed, names() - listed


@pytest.mark.slow
def test_its_commands_run(folder: Path) -> None:  # noqa: F811
    (folder / "data/training/raw").mkdir(parents=True)
    (folder / "chats.jsonl").rename(folder / "data/training/raw/chats.jsonl")
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[:2] == ["llamahome", "doctor"]
        short = ["--set", "distributed.join_timeout=1 s"] if "--num-nodes" in words else []
        typed = [sys.executable, "-m", *words, *short]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        result = subprocess.run(typed, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert "Traceback" not in result.stderr and "error[" not in result.stderr, result.stderr
        if "--json" in words:
            assert {check["status"] for check in json.loads(result.stdout)["checks"]} <= {"PASS", "WARN", "FAIL"}
            continue
        assert re.search(r"^\d+ passed, \d+ warnings?, \d+ failed$", result.stdout, flags=re.MULTILINE), result.stdout
        assert result.returncode == (4 if "  FAIL  " in result.stdout else 0)
        if not short and "--network" not in words:
            assert result.returncode == 0, result.stdout
