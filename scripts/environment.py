"""Creates .venv and installs requirements.lock and llamahome itself into it, with a progress line per phase.

Invariant: .venv contains the stamp only while the installation is complete. The stamp is removed before pip starts and written after the
last phase. Without a stamp, the next call starts again. An earlier stamp is restored only if pip failed before it changed anything.
"""

import errno
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llamahome.errors import MachineError
from llamahome.units import show_seconds
from pip_errors import Machine, diagnose

_TICK = 0.5
"""Seconds between two updates of the progress line on a terminal."""
_PLAIN_TICK = 10.0
"""Seconds between two lines without a terminal."""
_STEPS = ("Collecting", "Downloading", "Using cached", "Building", "Preparing", "Installing")
"""The first words of pip's lines that name the package it works on."""


class ProgressLine:
    """Shows the current phase and the elapsed time: one line that is rewritten on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.last_line = self.start

    def begin(self, phase: str) -> None:
        """Show that the phase begins."""
        self._write(phase, end="" if self.is_terminal else "\n")

    def tick(self, phase: str, detail: str) -> None:
        """Show that the phase is still running, and its detail."""
        if self.is_terminal or time.monotonic() - self.last_line >= _PLAIN_TICK:
            self._write(f"{phase}: {detail}" if detail else phase, end="" if self.is_terminal else "\n")

    def done(self, phase: str) -> None:
        """End the line of the phase on a terminal; elsewhere `begin` has written it."""
        if self.is_terminal:
            self._write(phase, end="\n")

    def _write(self, text: str, *, end: str) -> None:
        self.last_line = time.monotonic()
        line = f"  {show_seconds(self.last_line - self.start)}  {text}"
        if self.is_terminal:
            line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
        print(line, end=end, flush=True)


def install(root_text: str, stamp_text: str, more: Sequence[str] = ()) -> int:
    """Install requirements.lock and the lock files `more` into .venv unless its stamp is `stamp_text`; return the exit status.

    Errors are printed on stderr.
    """
    root = Path(root_text)
    progress = ProgressLine()
    try:
        with _installation_lock(root / "requirements.lock") as lock:
            if _read(root / ".venv/.llamahome-installed") != stamp_text:
                _install(root, stamp_text, ["requirements.lock", *more], progress, lock)
    except MachineError as error:
        print(f"\n{error}" if progress.is_terminal else error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("\ninterrupted; make setup starts again", file=sys.stderr)
        return 130
    except OSError as error:
        print(MachineError(diagnose(str(error), _machine())), file=sys.stderr)
        return MachineError.exit_status
    return 0


def _install(root: Path, stamp_text: str, locks: Sequence[str], progress: ProgressLine, lock: IO[bytes]) -> None:
    venv, stamp = root / ".venv", root / ".venv/.llamahome-installed"
    earlier = _read(stamp)
    stamp.unlink(missing_ok=True)
    (venv / "install.log").unlink(missing_ok=True)
    try:
        if earlier.splitlines()[1:] != stamp_text.splitlines()[1:] or not (venv / "bin/python").exists():
            earlier = ""
            _make_venv(root, progress, lock)
        pip = [str(venv / "bin/python"), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        pinned = sum("==" in line for name in locks for line in (root / name).read_text(encoding="utf-8").splitlines())
        _run([*pip, *(word for name in locks for word in ("-r", name))], f"installing {pinned} packages", root, progress, lock)
        _run([*pip, "--no-deps", "--no-build-isolation", "-e", "."], "installing llamahome", root, progress, lock)
    except (MachineError, KeyboardInterrupt):
        if earlier and "Installing collected packages" not in _read(venv / "install.log"):
            stamp.write_text(earlier, encoding="utf-8")
        raise
    part = stamp.with_name(".llamahome-installed.part")
    part.write_text(stamp_text, encoding="utf-8")
    part.replace(stamp)
    progress.begin("ready: .venv/bin/llamahome")
    progress.done("ready: .venv/bin/llamahome")


def _make_venv(root: Path, progress: ProgressLine, lock: IO[bytes]) -> None:
    phase = f"creating .venv with Python {platform.python_version()}"
    result = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", "--without-pip", ".venv"], cwd=root, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise MachineError(diagnose(result.stdout + result.stderr, _machine()))
    _run([str(root / ".venv/bin/python"), "-m", "ensurepip", "--default-pip"], phase, root, progress, lock)


def _run(command: list[str], phase: str, root: Path, progress: ProgressLine, lock: IO[bytes]) -> None:
    """Run `command` and append its output to the log. Raises MachineError with the reason of a failure.

    The command inherits the lock, so if this process is killed, the next installation waits until the command has ended.
    """
    log = root / ".venv/install.log"
    progress.begin(phase)
    with log.open("ab") as sink:
        start = sink.tell()
        process = subprocess.Popen(
            command, cwd=root, env=_environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, pass_fds=[lock.fileno()]
        )
        while True:
            try:
                status = process.wait(timeout=_TICK)
                break
            except subprocess.TimeoutExpired:
                progress.tick(phase, _last_step(log, start))
            except KeyboardInterrupt:
                process.wait()
                raise
    if status != 0:
        raise MachineError(diagnose(_read(log, start), _machine()))
    progress.done(phase)


def _environment() -> dict[str, str]:
    """The user's environment with its pip settings, without the variables that would install packages outside of .venv."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")
    }
    return environment | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def _last_step(log: Path, start: int) -> str:
    """What pip is doing: "Downloading torch-2.13.0...", or the number of installed packages while it unpacks."""
    lines = [line.strip() for line in _read(log, start).splitlines()]
    step = next((line for line in reversed(lines) if line.startswith(_STEPS)), "")
    if step.startswith("Installing collected"):
        return f"{sum(1 for _ in log.parent.glob('lib/python3*/site-packages/*.dist-info'))} installed"
    return step.partition(" (")[0][:80]


def _read(path: Path, start: int = 0) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _machine() -> Machine:
    tool = next((name for name in ("apt-get", "dnf", "brew") if shutil.which(name)), None)
    return Machine(f"{sys.version_info[0]}.{sys.version_info[1]}", f"{sys.platform} {platform.machine()}", tool)


@contextmanager
def _installation_lock(path: Path) -> Iterator[IO[bytes]]:
    """Hold a lock on `path`, so that only one of two concurrent calls installs. Go on without a lock if the file system has none."""
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("  another installation is running; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF):
                raise
        yield file
