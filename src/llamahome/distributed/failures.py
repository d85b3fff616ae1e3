"""How a worker process reports its error to the launcher, so that one error is shown instead of one per process.

A worker writes `rank-N.json` into the launch folder (named by LLAMAHOME_LAUNCH) and stops writing to stderr. The launcher picks the first
cause and raises it again as the same error. The launch folder also holds the path of the current run, so that a restart resumes that run.
In a process that no launcher started, these functions do nothing.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamahome import durable, errors
from llamahome.errors import LeftAtOnce, LlamaHomeError, MachineError, Problem, Stopped

LAUNCH_FOLDER = "LLAMAHOME_LAUNCH"
"""Environment variable: the folder that the launcher made for its workers."""
LAUNCHER_PID = "LLAMAHOME_LAUNCHER_PID"
RUN_TO_RESUME = "LLAMAHOME_BEGUN"
"""Environment variable: the folder of the run that an earlier attempt of the same launch started."""
ATTEMPT = "LLAMAHOME_ROUND"
"""Environment variable: the number of this attempt; the same on all machines."""
PEER_LOST = "distributed.peer-lost"
DEFECT = "distributed.process-failed"
HUNG = "training.hung"
SAVING_S = 120.0
"""How long a process has for its last checkpoint before it is ended."""
_POLL_S = 1.0
_EXCERPT_LINES = 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ErrorPayload:
    """An error as plain data, so that another process can raise it again."""

    kind: str
    """Name of its class in errors.py."""
    problems: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, error: LlamaHomeError) -> "ErrorPayload":
        """The payload of `error`. If errors.py does not define its class, `kind` is the nearest base class that errors.py defines."""
        kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == errors.__name__)
        return cls(kind, tuple(asdict(problem) for problem in error.problems))

    @property
    def message(self) -> str:
        """The message of the first problem."""
        return str(self.problems[0]["message"])

    def error(self) -> LlamaHomeError:
        """Rebuild the error."""
        kind: type[LlamaHomeError] = getattr(errors, self.kind)
        return kind([Problem(**problem) for problem in self.problems])


@dataclass(frozen=True)
class Failure:
    """The error that a worker wrote to the launch folder."""

    rank: int
    time: float
    error: LlamaHomeError

    @property
    def is_consequence(self) -> bool:
        """Whether the worker failed only because it lost another process."""
        return self.error.problems[0].code == PEER_LOST

    @property
    def sort_key(self) -> tuple[bool, bool, float]:
        """Sorts real failures first, then orderly stops, then consequences; within each group by time."""
        return self.is_consequence, isinstance(self.error, Stopped), self.time


def launch_folder() -> Path | None:
    """The folder of the launcher that started this process. None if no launcher did, or if its folder is gone (a stale variable)."""
    folder = Path(os.environ[LAUNCH_FOLDER]) if LAUNCH_FOLDER in os.environ else None
    return folder if folder is not None and folder.is_dir() else None


def write_failure(error: BaseException, *, rank: int, folder: Path) -> None:
    """Write `error` to the launch folder. For an error that is not ours the traceback becomes the excerpt."""
    if not isinstance(error, LlamaHomeError):
        text = "".join(traceback.format_exception(error)).rstrip()
        message = f"process {rank} failed: {type(error).__name__}: {error}".splitlines()[0]
        error = LlamaHomeError(Problem(code=DEFECT, message=message, excerpt=text))
    content = {"time": time.time(), **asdict(ErrorPayload.of(error))}
    (folder / f"rank-{rank}.json").write_text(json.dumps(content), encoding="utf-8")


def read_failures(folder: Path) -> list[Failure]:
    """The failures of all workers in `folder`; the first one is the cause."""
    failures = []
    for path in folder.glob("rank-*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # the worker was killed while it wrote; its exit status still shows the failure
        error = ErrorPayload(content["kind"], content["problems"]).error()
        failures.append(Failure(int(path.stem.removeprefix("rank-")), content["time"], error))
    return sorted(failures, key=lambda failure: failure.sort_key)


def remove_failures(folder: Path) -> None:
    """Remove the failures of an earlier attempt; the path of the run stays."""
    for path in folder.glob("rank-*.json"):
        path.unlink()


def note_run(root: Path) -> None:
    """Write the folder of the current run to the launch folder, so that the next attempt resumes it."""
    folder = launch_folder()
    if folder is not None:
        durable.write_whole(folder / "run", str(root), flush=False)


def noted_run(folder: Path) -> str | None:
    """The path that `note_run` wrote, or None."""
    path = folder / "run"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def run_to_go_on() -> Path | None:
    """The run that an earlier attempt of this launch started; None in a first attempt."""
    return Path(os.environ[RUN_TO_RESUME]) if os.environ.get(RUN_TO_RESUME) and launch_folder() is not None else None


def mute_stderr() -> None:
    """Send stderr of this process to /dev/null and ignore SIGTERM, because the launcher reports the error and ends the workers."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    ignore_sigterm()


def ignore_sigterm() -> None:
    """Ignore the SIGTERM that the launcher sends to all workers once the first one has exited."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def launcher_is_gone() -> bool:
    """Whether the launcher of this process has died."""
    return os.getppid() != int(os.environ[LAUNCHER_PID])


def tie_to_launcher() -> None:
    """Ask Linux to send SIGUSR1 to this process when its launcher dies; call it before the long imports.

    Without a signal handler SIGUSR1 ends the process. Other systems rely on `watch_launcher` alone.
    """
    if launch_folder() is not None:
        tie_to_parent()()


def tie_to_parent() -> Callable[[], None]:
    """A function that asks Linux to send SIGUSR1 to the process that calls it when its parent dies; elsewhere it does nothing.

    The library is loaded here, because a new process may call the function between fork and exec.
    """
    if sys.platform != "linux":
        return lambda: None
    library = ctypes.CDLL(None)
    return lambda: library.prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)


def watch_launcher(done: threading.Event) -> None:
    """Start a thread that stops this process when its launcher dies, even by SIGKILL, so that no worker stays behind.

    The process gets SIGUSR1 and SAVING_S seconds to save; then it is ended. `done` ends the thread.
    """

    def watch() -> None:
        while not launcher_is_gone():
            if done.wait(_POLL_S):
                return
        os.kill(os.getpid(), signal.SIGUSR1)  # not SIGTERM: a second SIGTERM means to exit without saving
        if not done.wait(SAVING_S):
            os._exit(1)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


def raise_for_workers(folder: Path, statuses: Mapping[int, int], *, reporting_rank: int, signals: Sequence[int]) -> int:
    """Raise the error that ended the workers; `statuses` are the exit statuses of the failed ones by rank.

    Returns 0 if none failed, or the exit status of `reporting_rank` if that rank has already shown its error on this screen.
    `folder` is the launch folder, `signals` are the signals that the launcher received.
    """
    if not statuses:
        return 0
    failures = read_failures(folder)
    if failures and not failures[0].is_consequence:
        raise failures[0].error
    if statuses.get(reporting_rank, 0) > 0 and reporting_rank not in {failure.rank for failure in failures}:
        return statuses[reporting_rank]
    if signals and not failures:
        name = signal.Signals(signals[-1]).name
        raise LeftAtOnce(Problem(code="run.left-at-once", message=f"stopped by {name} before anything was saved"))
    if not failures and all(status == -signal.SIGTERM for status in statuses.values()):
        raise LeftAtOnce(Problem(code="run.left-at-once", message="a process was stopped by SIGTERM before anything was saved"))
    killed = {rank: status for rank, status in statuses.items() if status < 0 and status != -signal.SIGTERM}
    if killed:
        raise MachineError(_killed(*min(killed.items())))
    if failures:
        raise failures[0].error
    rank, status = min(statuses.items(), key=lambda each: (each[1] < 0, each[0]))
    raise _error_from_stderr(folder, rank, status)


def error_of_workers(folder: Path, statuses: Mapping[int, int], *, reporting_rank: int, signals: Sequence[int]) -> LlamaHomeError:
    """The error of `raise_for_workers`, for other machines, whose screens have not shown it."""
    try:
        status = raise_for_workers(folder, statuses, reporting_rank=reporting_rank, signals=signals)
    except LlamaHomeError as error:
        return error
    message = f"process {reporting_rank} ended with exit status {status}; its own screen shows the reason"
    return _error_class(status)(Problem(code=DEFECT, message=message))


def _killed(rank: int, status: int) -> Problem:
    name = signal.Signals(-status).name
    reason = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    message = f"process {rank} was killed by {name}{reason}"
    return Problem(code="distributed.process-killed", message=message, hint="llamahome train-resume latest")


def _error_from_stderr(folder: Path, rank: int, status: int) -> LlamaHomeError:
    """For a process that ended before it could write its failure: an error with the last lines of its stderr and its exit status."""
    attempt = max(folder.glob("output/*/attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_")))
    local_size = len(list(attempt.glob("*")))
    log = attempt / str(rank % local_size) / "stderr.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    message = f"process {rank} ended with exit status {status} before its work began"
    return _error_class(status)(Problem(code=DEFECT, message=message, excerpt="\n".join(lines[-_EXCERPT_LINES:]) or None))


def _error_class(status: int) -> type[LlamaHomeError]:
    classes: dict[int, type[LlamaHomeError]] = {kind.exit_status: kind for kind in LlamaHomeError.__subclasses__()}
    return classes.get(status, LlamaHomeError)
