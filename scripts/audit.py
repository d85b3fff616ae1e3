"""Asks pip-audit whether a pinned package has a known vulnerability. Exit status 1 if one has, 0 also if that cannot be asked here.

It runs only where pip-audit is installed (`pip install pip-audit`); without a network it says so and fails nothing.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 60


def main() -> int:
    """Run pip-audit on requirements-hashes.lock, and print what it found or why it was not asked."""
    command = [sys.executable, "-m", "pip_audit"] if importlib.util.find_spec("pip_audit") else [shutil.which("pip-audit") or ""]
    if not command[0]:
        print("known vulnerabilities: not checked, pip-audit is not installed")
        return 0
    words = [*command, "--requirement", str(ROOT / "requirements-hashes.lock"), "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"known vulnerabilities: not checked, pip-audit took more than {_SECONDS} s")
        return 0
    if done.returncode == 0:
        print("known vulnerabilities: none in requirements-hashes.lock")
        return 0
    if "known vulnerabilit" in done.stderr:
        print(f"{done.stdout}{done.stderr}", end="", file=sys.stderr)
        return 1
    reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1][:200]
    print(f"known vulnerabilities: not checked, pip-audit failed: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
