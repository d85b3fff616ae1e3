"""How a process that llamahome started tells its launcher why it ends, so that one block is shown and not one per process.

A worker writes `rank-N.json` into the launch folder (named by LLAMAHOME_LAUNCH) and falls silent; the launcher picks the
first cause and raises it again as the same error. Beside it lies the folder of the run that was begun, which the next attempt goes
on with. Without a launcher nothing here does anything.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamahome import errors
from llamahome.errors import LlamaHomeError, Problem, Stopped

LAUNCH_FOLDER = "LLAMAHOME_LAUNCH"
"""Environment variable: the folder that the launcher made for its workers."""
LAUNCHER_PID = "LLAMAHOME_LAUNCHER_PID"
BEGUN = "LLAMAHOME_BEGUN"
"""Environment variable: the folder of the run that an earlier attempt of the same launch began."""
ROUND = "LLAMAHOME_ROUND"
"""Environment variable: which attempt of the launch this is; the same number on all machines."""
PEER_LOST = "distributed.peer-lost"
DEFECT = "distributed.process-failed"
_LOOK_EVERY_S = 1.0
_SAVING_S = 120.0
"""What a process has for its last checkpoint when its launcher is gone."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Told:
    """An error as plain data, to be sent and raised again elsewhere."""

    kind: str
    """Name of its class in errors.py."""
    problems: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, error: LlamaHomeError) -> "Told":
        """What `error` says; of a kind that errors.py does not have, the nearest one."""
        kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == errors.__name__)
        return cls(kind, tuple(asdict(problem) for problem in error.problems))

    @property
    def message(self) -> str:
        """Of the first problem."""
        return str(self.problems[0]["message"])

    def error(self) -> LlamaHomeError:
        """The error again."""
        kind: type[LlamaHomeError] = getattr(errors, self.kind)
        return kind([Problem(**problem) for problem in self.problems])


@dataclass(frozen=True)
class Failure:
    """What a worker left."""

    rank: int
    time: float
    error: LlamaHomeError

    @property
    def is_consequence(self) -> bool:
        """Whether it only says that another process went away."""
        return self.error.problems[0].code == PEER_LOST

    @property
    def urgency(self) -> tuple[bool, bool, float]:
        """Sorts the cause first: real failures, then an orderly stop, then those who merely lost a peer; each by time."""
        return self.is_consequence, isinstance(self.error, Stopped), self.time


def launch_folder() -> Path | None:
    """The launcher's folder when this process was started by `launch`; a variable left over from a launch that is over is not obeyed."""
    folder = Path(os.environ[LAUNCH_FOLDER]) if LAUNCH_FOLDER in os.environ else None
    return folder if folder is not None and folder.is_dir() else None


def record(error: BaseException, *, rank: int, folder: Path) -> None:
    """Leave `error` for the launcher. A defect keeps its traceback, as the excerpt."""
    if isinstance(error, LlamaHomeError):
        told = Told.of(error)
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
        message = f"process {rank} failed: {type(error).__name__}: {error}".splitlines()[0]
        told = Told.of(LlamaHomeError(Problem(code=DEFECT, message=message, excerpt=text)))
    content = {"time": time.time(), **asdict(told)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(content), encoding="utf-8")


def recorded(folder: Path) -> list[Failure]:
    """What workers left in `folder`, the cause first."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # killed while writing: the exit status still tells of it
        error = Told(content["kind"], content["problems"]).error()
        found.append(Failure(int(path.stem.removeprefix("rank-")), content["time"], error))
    return sorted(found, key=lambda failure: failure.urgency)


def forget(folder: Path) -> None:
    """Remove what the processes of an earlier attempt left, but for the run that they began."""
    for path in folder.glob("rank-*.json"):
        path.unlink()


def note_run(root: Path) -> None:
    """Tell the launcher which run was begun, so that the next attempt goes on with it."""
    folder = launch_folder()
    if folder is not None:
        fresh = folder / f"run-{os.getpid()}"
        fresh.write_text(str(root), encoding="utf-8")
        fresh.replace(folder / "run")


def noted_run(folder: Path) -> str | None:
    """What `note_run` told."""
    path = folder / "run"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def run_to_go_on() -> Path | None:
    """The run that an earlier attempt of this launch began; None in a first attempt."""
    return Path(os.environ[BEGUN]) if os.environ.get(BEGUN) and launch_folder() is not None else None


def fall_silent() -> None:
    """Send this process's stderr to nowhere from here on, and let it leave in peace when the launcher ends the others."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    leave_in_peace()


def leave_in_peace() -> None:
    """Ignore the SIGTERM that the launcher sends to every process once the first has left."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def launcher_is_gone() -> bool:
    """Whether the process that started this one has died."""
    return os.getppid() != int(os.environ[LAUNCHER_PID])


def tie_to_launcher() -> None:
    """Let the system ask this process to stop (SIGUSR1) the moment its launcher dies; call it before the long imports.

    Only Linux can. Until somebody listens to the signal, it ends the process.
    """
    if launch_folder() is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)


def follow_launcher(done: threading.Event) -> None:
    """When the launcher dies, even by kill -9, ask this process to stop, so that none is left behind; one that cannot stop is ended."""

    def watch() -> None:
        while not launcher_is_gone():
            if done.wait(_LOOK_EVERY_S):
                return
        os.kill(os.getpid(), signal.SIGUSR1)  # not SIGTERM: a second one means to leave without saving
        if not done.wait(_SAVING_S):
            os._exit(1)

    threading.Thread(target=watch, name="follow-launcher", daemon=True).start()
