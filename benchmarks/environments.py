"""Creates a virtual environment for each peer in .bench/ once. llamahome and the plain loop use the project's environment."""

import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_PEERS = {
    "trl": ("torch==2.13.0", "trl==1.16.0", "peft==0.21.2", "transformers==5.23.0"),
    "litgpt": ("torch==2.13.0", "litgpt==0.5.13"),
    "pictures": ("matplotlib==3.10.8",),
}
"""All use the torch of requirements.lock, so that the same matrix products are compared."""


class NotInstalled(RuntimeError):
    """The environment of a peer cannot be created; the benchmark continues without the peer."""


def python_of(name: str, cache: Path, *, own: Sequence[str] = ("ours", "plain")) -> str:
    """Return the interpreter for a system; create its environment if it is missing."""
    if name in own:
        return sys.executable
    folder, requirements = _folder(name, cache), " ".join(_PEERS[name])
    python, stamp = folder / "bin/python", folder / "installed"
    if missing([name], cache):
        print(f"installing {requirements} into {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-E", "-m", "pip", "install", "-q", *_PEERS[name]]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise NotInstalled(f"cannot be installed: {_last_line(result.stderr or result.stdout)}")
        stamp.write_text(requirements, encoding="utf-8")
    return str(python)


def missing(names: Iterable[str], cache: Path) -> list[str]:
    """Return the names whose environment is missing, or has other versions."""
    stamps = {name: _folder(name, cache) / "installed" for name in names if name in _PEERS}
    return [name for name, stamp in stamps.items() if not stamp.is_file() or stamp.read_text(encoding="utf-8") != " ".join(_PEERS[name])]


def _folder(name: str, cache: Path) -> Path:
    return cache / f"venv-{name}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1][:200] if lines else "no output"
