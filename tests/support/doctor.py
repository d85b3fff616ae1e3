"""Runs `llamahome doctor --json` as a user types it, after commands of a shell that plant a fault or follow a help line."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.sources import ROOT


@dataclass(frozen=True)
class Diagnosis:
    """What doctor found."""

    status: int
    checks: dict[str, dict]
    err: str

    def __getitem__(self, name: str) -> dict:
        assert name in self.checks, f"{sorted(self.checks)}\n{self.err}"
        return self.checks[name]

    def of(self, status: str) -> set[str]:
        return {name for name, check in self.checks.items() if check["status"] == status}


def diagnose(folder: Path, *words: str, before: str = "", timeout: float = 120, **variables: str) -> Diagnosis:
    """`before` is typed in the same shell; a help line of doctor is one."""
    command = shlex.join([sys.executable, "-m", "llamahome", "doctor", "--json", *words])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), **variables}
    typed = ["bash", "-c", f"{before}\nexec {command}"]
    result = subprocess.run(typed, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.stdout.count("\n") == 1 and "Traceback" not in result.stderr, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert list(found) == ["checks"] and all(list(each) == ["name", "status", "detail", "help"] for each in found["checks"])
    assert result.returncode == (4 if any(each["status"] == "FAIL" for each in found["checks"]) else 0), result.stderr
    checks = {each["name"]: each for each in found["checks"]}
    assert len(checks) == len(found["checks"]), "each name once"
    return Diagnosis(result.returncode, checks, result.stderr)
