"""Packages that only some tests need, fetched with pip into build/ and never installed; what cannot be fetched is a reason to skip."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.sources import ROOT


def unpacked(requirement: str) -> Path:
    """The folder of a package of PyPI, a wheel that was unpacked, without what it depends on."""
    folder = ROOT / "build/packages" / requirement
    if not folder.is_dir():
        words = ["install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile", "--root-user-action=ignore"]
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", *words, "--upgrade", "--target", str(partial), requirement]
        if subprocess.run(command, capture_output=True, timeout=120, check=False).returncode:
            pytest.skip(f"pip cannot fetch {requirement}")
        with contextlib.suppress(OSError):  # another process was faster
            partial.rename(folder)
    return folder
