"""Which launcher holds a run of several machines: two small files in the run's folder, so that any machine may go on alone, and only one.

The holder renews `holder.json` once a second. A machine that has lost machine 0 waits until the file has not changed for a while, and then
takes the run over by making a file whose name says how often that has happened: only one machine can make it. A holder that finds the
next such file has been overtaken and ends its processes. Machines that do not see one folder never take over. A network file system
shows the file's new content to a reader that opens it again.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llamahome import durable
from llamahome.errors import MachineError, Problem

RENEW_EVERY_S = 1.0
FILE = "holder.json"
_POLL_S = 0.5


@dataclass(frozen=True)
class _Sign:
    """What `holder.json` says."""

    launcher: str
    turn: int
    """The number of this holder."""
    beat: int


class Holder:
    """The claim of one launcher on a run."""

    def __init__(self, run: Path, launcher: str, *, turn: int | None = None) -> None:
        """`turn` is the number that `take_over` has got; otherwise the run is taken whoever holds it, because the user started it again."""
        self._run, self._launcher, self._beat = run, launcher, 0
        self._renewed_at = -RENEW_EVERY_S
        self._turn = turn or _last_turn(run) + 1
        with suppress(OSError):  # nobody can take over a run whose folder cannot be written
            while turn is None and not _make_claim(run, self._turn, launcher):
                self._turn += 1
            for number in _turns(run):
                if number < self._turn:
                    _claim(run, number).unlink()

    def renew(self) -> None:
        """Show that this launcher is alive, at most once a second. Raises MachineError distributed.overtaken."""
        now = time.monotonic()
        if now - self._renewed_at < RENEW_EVERY_S:
            return
        self._renewed_at = now
        if _last_turn(self._run) > self._turn:
            message = (
                "another machine goes on with the run, because this one gave no sign or the run was started again there: this machine ends"
            )
            hint = "when that run has ended, on all machines: llamahome train-resume latest"
            raise MachineError(Problem(code="distributed.overtaken", message=message, where=str(self._run), hint=hint))
        self._beat += 1
        sign = {"launcher": self._launcher, "turn": self._turn, "beat": self._beat}
        with suppress(OSError):  # a disk that is full or away for a moment is no reason to stop
            durable.write_whole(self._run / FILE, json.dumps(sign), flush=False)


def take_over(run: Path, launcher: str, *, silent_s: float, sleep: Callable[[float], None] = time.sleep) -> Holder | None:
    """Take over a run whose holder gives no sign for `silent_s` seconds; None if it does, or another machine was faster.

    Also None if this machine does not see the holder's file.
    """
    seen = _read(run)
    if seen is None:
        return None
    waited = 0.0
    while waited < silent_s:
        sleep(_POLL_S)
        waited += _POLL_S
        if _read(run) != seen:
            return None
    turn = seen.turn + 1
    try:
        taken = _last_turn(run) < turn and _make_claim(run, turn, launcher)
    except OSError:
        return None
    return Holder(run, launcher, turn=turn) if taken else None


def _make_claim(run: Path, turn: int, launcher: str) -> bool:
    """Make the file of `turn`; False if another machine has made it. Raises OSError."""
    try:
        with _claim(run, turn).open("x", encoding="utf-8") as file:
            file.write(launcher)
    except FileExistsError:
        return False
    return True


def _claim(run: Path, turn: int) -> Path:
    return run / f"holder-{turn}"


def _turns(run: Path) -> list[int]:
    numbers = (path.name.removeprefix("holder-") for path in run.glob("holder-*"))
    return [int(number) for number in numbers if number.isdigit()]


def _last_turn(run: Path) -> int:
    return max(_turns(run), default=0)


def _read(run: Path) -> _Sign | None:
    try:
        return _Sign(**json.loads((run / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
