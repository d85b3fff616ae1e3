"""Makes .venv and installs requirements.lock and llamahome itself into it, with a clock line per phase.

Invariant: the stamp stands in .venv only while .venv is whole. It is taken away before pip starts and written after the last
phase; without it the next call begins anew. Only when pip failed before it changed anything is an earlier stamp put back.
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
from trouble import Machine, explain

_TICK = 0.5
"""Seconds between two looks at a running command; the clock on a terminal moves this often."""
_PLAIN_TICK = 10.0
"""Seconds between two lines where there is no terminal."""
_STEPS = ("Collecting", "Downloading", "Using cached", "Building", "Preparing", "Installing")
"""How those lines of pip begin that tell what it works on."""


class Clock:
    """Shows what is being done and since when: one live line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.spoken = self.start

    def begin(self, phase: str) -> None:
        """Name the phase that starts now."""
        self._write(phase, end="" if self.live else "\n")

    def tick(self, phase: str, detail: str) -> None:
        """Show that the phase goes on, and with what."""
        if self.live or time.monotonic() - self.spoken >= _PLAIN_TICK:
            self._write(f"{phase}: {detail}" if detail else phase, end="" if self.live else "\n")

    def done(self, phase: str) -> None:
        """Leave a line for a phase that came to its end; where there is no terminal it has one already."""
        if self.live:
            self._write(phase, end="\n")

    def _write(self, text: str, *, end: str) -> None:
        self.spoken = time.monotonic()
        line = f"  {show_seconds(self.spoken - self.start)}  {text}"
        if self.live:
            line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
        print(line, end=end, flush=True)


def install(root_text: str, stamp_text: str, more: Sequence[str] = ()) -> int:
    """Bring .venv to what `stamp_text` stands for, from requirements.lock and `more` such files; returns the exit status.

    Errors are told on stderr.
    """
    root = Path(root_text)
    clock = Clock()
    try:
        with _alone(root / "requirements.lock") as lock:
            if _read(root / ".venv/.llamahome-installed") != stamp_text:
                _install(root, stamp_text, ["requirements.lock", *more], clock, lock)
    except MachineError as error:
        print(f"\n{error}" if clock.live else error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("\ninterrupted; make setup begins anew", file=sys.stderr)
        return 130
    except OSError as error:
        print(MachineError(explain(str(error), _machine())), file=sys.stderr)
        return MachineError.exit_status
    return 0


def _install(root: Path, stamp_text: str, locks: Sequence[str], clock: Clock, lock: IO[bytes]) -> None:
    venv, stamp = root / ".venv", root / ".venv/.llamahome-installed"
    earlier = _read(stamp)
    stamp.unlink(missing_ok=True)
    (venv / "install.log").unlink(missing_ok=True)
    try:
        if earlier.splitlines()[1:] != stamp_text.splitlines()[1:] or not (venv / "bin/python").exists():
            earlier = ""
            _make_venv(root, clock, lock)
        pip = [str(venv / "bin/python"), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        pinned = sum("==" in line for name in locks for line in (root / name).read_text(encoding="utf-8").splitlines())
        _run([*pip, *(word for name in locks for word in ("-r", name))], f"installing {pinned} packages", root, clock, lock)
        _run([*pip, "--no-deps", "--no-build-isolation", "-e", "."], "installing llamahome", root, clock, lock)
    except (MachineError, KeyboardInterrupt):
        if earlier and "Installing collected packages" not in _read(venv / "install.log"):
            stamp.write_text(earlier, encoding="utf-8")
        raise
    part = stamp.with_name(".llamahome-installed.part")
    part.write_text(stamp_text, encoding="utf-8")
    part.replace(stamp)
    clock.begin("ready: .venv/bin/llamahome")
    clock.done("ready: .venv/bin/llamahome")


def _make_venv(root: Path, clock: Clock, lock: IO[bytes]) -> None:
    phase = f"making .venv with Python {platform.python_version()}"
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", "--without-pip", ".venv"], cwd=root, capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise MachineError(explain(made.stdout + made.stderr, _machine()))
    _run([str(root / ".venv/bin/python"), "-m", "ensurepip", "--default-pip"], phase, root, clock, lock)


def _run(command: list[str], phase: str, root: Path, clock: Clock, lock: IO[bytes]) -> None:
    """Run `command` with its output at the end of the log; MachineError says why it failed.

    The command inherits the lock: should this process be killed, the next installation waits until the command is done.
    """
    log = root / ".venv/install.log"
    clock.begin(phase)
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
                clock.tick(phase, _last_step(log, start))
            except KeyboardInterrupt:
                process.wait()
                raise
    if status != 0:
        raise MachineError(explain(_read(log, start), _machine()))
    clock.done(phase)


def _environment() -> dict[str, str]:
    """The user's environment and so the user's pip settings, but nothing that would send packages elsewhere than into .venv."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")
    }
    return environment | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def _last_step(log: Path, start: int) -> str:
    """What pip does now, in a few words: "Downloading torch-2.13.0..."; while it unpacks, how many packages are in place."""
    lines = [line.strip() for line in _read(log, start).splitlines()]
    found = next((line for line in reversed(lines) if line.startswith(_STEPS)), "")
    if found.startswith("Installing collected"):
        return f"{sum(1 for _ in log.parent.glob('lib/python3*/site-packages/*.dist-info'))} in place"
    return found.partition(" (")[0][:80]


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
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """Hold a lock on `path`, so that two calls at the same time install once; where the file system has no locks, go on without."""
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("  another installation is at work here; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF):
                raise
        yield file
