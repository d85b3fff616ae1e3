"""Packages that only slow tests need, beside the installed ones: each in an environment of its own under .bench/, installed once."""

import subprocess
import sys
from pathlib import Path

import pytest

_BENCH = Path(__file__).resolve().parents[2] / ".bench"


def python_with(package: str) -> Path:
    """A Python that has `package` and everything that this Python has; the test is skipped if it cannot be installed."""
    folder = _BENCH / package.partition(">")[0]
    python = folder / "bin/python"
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
        (site,) = folder.glob("lib/python*/site-packages")
        here = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "beside.pth").write_text(here + "\n", encoding="utf-8")
        command = [str(python), "-E", "-m", "pip", "install", "-q", package]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode != 0:
            pytest.skip(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        (folder / "ready").touch()
    return python
