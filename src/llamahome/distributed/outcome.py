"""What the end of processes comes to: the error to raise, from their exit statuses and from the words that they left."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from llamahome.distributed import failures
from llamahome.errors import LeftAtOnce, LlamaHomeError, MachineError, Problem

_EXCERPT_LINES = 20


def outcome(folder: Path, statuses: Mapping[int, int], *, spoken_by: int, asked: Sequence[int]) -> int:
    """0, or the exit status of a process that told its reason itself (`spoken_by`); raises what nobody has told yet.

    `folder` is the launch's, `asked` are the signals that came to the launcher.
    """
    if not statuses:
        return 0
    told = failures.recorded(folder)
    if told and not told[0].is_consequence:
        raise told[0].error
    if statuses.get(spoken_by, 0) > 0 and spoken_by not in {failure.rank for failure in told}:
        return statuses[spoken_by]
    if asked and not told:
        raise LeftAtOnce(Problem(code="run.left-at-once", message=f"stopped by {signal.Signals(asked[-1]).name} before anything was saved"))
    if not told and all(status == -signal.SIGTERM for status in statuses.values()):
        raise LeftAtOnce(Problem(code="run.left-at-once", message="a process was stopped by SIGTERM before anything was saved"))
    killed = {rank: status for rank, status in statuses.items() if status < 0 and status != -signal.SIGTERM}
    if killed:
        raise MachineError(_killed(*min(killed.items())))
    if told:
        raise told[0].error
    rank, status = min(statuses.items(), key=lambda each: (each[1] < 0, each[0]))
    raise _found_in_output(folder, rank, status)


def outcome_as_error(folder: Path, statuses: Mapping[int, int], *, spoken_by: int, asked: Sequence[int]) -> LlamaHomeError:
    """The same as an error for other machines, on whose screens nothing was told."""
    try:
        status = outcome(folder, statuses, spoken_by=spoken_by, asked=asked)
    except LlamaHomeError as error:
        return error
    message = f"process {spoken_by} ended with exit status {status}; it said why on its own screen"
    return _of_status(status)(Problem(code=failures.DEFECT, message=message))


def _killed(rank: int, status: int) -> Problem:
    number = signal.Signals(-status)
    why = ", which is how the system answers when memory runs out" if number == signal.SIGKILL else ""
    return Problem(
        code="distributed.process-killed",
        message=f"process {rank} was killed by {number.name}{why}",
        hint="llamahome train-resume latest",
    )


def _found_in_output(folder: Path, rank: int, status: int) -> LlamaHomeError:
    """For a process that ended before it could leave word: the end of what it wrote to stderr, and the same exit status."""
    attempt = max(folder.glob("output/*/attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_")))
    streams = list(attempt.glob("*/stderr.log"))
    processes = len(list(attempt.glob("*")))
    mine = [path for path in streams if int(path.parent.name) == rank % processes]
    written = mine[0].read_text(encoding="utf-8", errors="replace").strip() if mine else ""
    excerpt = "\n".join(written.splitlines()[-_EXCERPT_LINES:]) or None
    message = f"process {rank} ended with exit status {status} before it had started its work"
    return _of_status(status)(Problem(code=failures.DEFECT, message=message, excerpt=excerpt))


def _of_status(status: int) -> type[LlamaHomeError]:
    kinds: dict[int, type[LlamaHomeError]] = {kind.exit_status: kind for kind in LlamaHomeError.__subclasses__()}
    return kinds.get(status, LlamaHomeError)
