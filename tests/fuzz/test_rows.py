"""A minute of guided fuzzing of each kind of file; `make test-slow` runs it every night where atheris is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("rows.py")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_no_bytes_end_in_a_traceback_or_a_hang(kind: str, tmp_path: Path) -> None:
    words = [sys.executable, str(RUNNER), "--kind", kind, "--seconds", "60"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(tmp_path.iterdir()) == []
