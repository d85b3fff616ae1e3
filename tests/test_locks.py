"""The lock files agree, and asking for known vulnerabilities never stops a check for lack of a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.compile(r"^([\w.-]+)==([\w.+-]+)", re.MULTILINE)


def pinned(name: str) -> dict[str, str]:
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in PINNED.findall((ROOT / name).read_text())}


def test_every_pinned_package_but_torch_has_hashes_of_its_version() -> None:
    plain, hashed = pinned("requirements.lock"), pinned("requirements-hashes.lock")
    assert {name: version for name, version in plain.items() if name != "torch"} == hashed
    blocks = re.split(r"^(?=[\w.-]+==)", (ROOT / "requirements-hashes.lock").read_text(), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(hashed)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)


@pytest.mark.parametrize(
    ("script", "status", "says"),
    [
        ("exit 0", 0, "none in requirements-hashes.lock"),
        ("echo 'Found 1 known vulnerability in 1 package' >&2; echo 'jinja2 1.0 CVE-1'; exit 1", 1, "CVE-1"),
        ("echo 'ERROR: connection refused' >&2; exit 1", 0, "not checked, pip-audit failed: ERROR: connection refused"),
        (None, 0, "pip-audit is not installed"),
    ],
)
def test_an_audit_fails_for_a_vulnerability_alone(script: str | None, status: int, says: str, tmp_path: Path) -> None:
    if script is not None:
        (tmp_path / "pip-audit").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "pip-audit").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "scripts/audit.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status and says in done.stdout + done.stderr
