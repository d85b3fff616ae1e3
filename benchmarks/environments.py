"""A virtual environment for each peer, made once in .bench/ and kept; llamahome itself and the plain loop use the project's own."""

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
"""The same torch as in requirements.lock for all, so that the same matrix products are compared."""


class NotInstalled(RuntimeError):
    """A peer whose environment cannot be made; the benchmark goes on without it."""


def python_of(name: str, cache: Path, *, own: Sequence[str] = ("ours", "plain")) -> str:
    """The interpreter for a system, its environment made now unless it is there."""
    if name in own:
        return sys.executable
    folder, asked = _folder(name, cache), " ".join(_PEERS[name])
    python, stamp = folder / "bin/python", folder / "installed"
    if missing([name], cache):
        print(f"installing {asked} into {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        for words in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "-q", *_PEERS[name]]):
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotInstalled(f"cannot be installed: {_last_line(done.stderr or done.stdout)}")
        stamp.write_text(asked, encoding="utf-8")
    return str(python)


def missing(names: Iterable[str], cache: Path) -> list[str]:
    """Those of `names` whose environment is not made yet, or was made for other versions."""
    stamps = {name: _folder(name, cache) / "installed" for name in names if name in _PEERS}
    return [name for name, stamp in stamps.items() if not stamp.is_file() or stamp.read_text(encoding="utf-8") != " ".join(_PEERS[name])]


def _folder(name: str, cache: Path) -> Path:
    return cache / f"venv-{name}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1][:200] if lines else "no word why"
