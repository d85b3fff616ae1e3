"""Which tests run: the fast ones; with --medium, or when they are named, the medium ones as well; and with how many threads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.sources import ROOT

TESTS = """
import os
import pytest

def test_fast(): assert os.environ["OMP_NUM_THREADS"] == os.environ["EXPECTED"]
@pytest.mark.medium
def test_medium(): pass
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.slow
@pytest.mark.medium
def test_both(): pass
"""


def _run(folder: Path, *words: str, threads: int = 2) -> list[str]:
    """The tests that pass in a project with one test of each kind."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/conftest.py", folder / "tests")
    (folder / "tests/test_each.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS" and not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-rp", "-p", "no:hypothesispytest", "-m", "not slow", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment | {"EXPECTED": str(threads), "CI": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fast tests took" in done.stdout
    return sorted(re.findall(r"^PASSED .*::test_(\w+)", done.stdout, re.MULTILINE), key=("fast", "medium", "slow", "both").index)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ["fast"]),
        (("--medium",), ["fast", "medium"]),
        (("tests/test_each.py",), ["fast", "medium"]),
        (("tests/test_each.py::test_medium",), ["medium"]),
        (("-k", "medium"), ["medium"]),
        (("-m", "medium"), ["medium", "both"]),
        (("-m", "slow"), ["slow", "both"]),
    ],
    ids=" ".join,
)
def test_medium_tests_run_with_medium_and_when_they_are_named(tmp_path: Path, words: tuple[str, ...], expected: list[str]) -> None:
    assert _run(tmp_path, *words) == expected


@pytest.mark.skipif((os.cpu_count() or 1) > 8, reason="so many workers")
def test_as_many_workers_as_cores_have_one_thread_each_and_run_the_same_tests(tmp_path: Path) -> None:
    workers = ("-n", str(os.cpu_count()))
    assert _run(tmp_path, *workers, threads=1) == ["fast"]
    assert _run(tmp_path, *workers, "--medium", threads=1) == ["fast", "medium"]
