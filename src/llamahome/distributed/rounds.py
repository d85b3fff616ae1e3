"""Which machines train together, and when that changes: machine 0 decides it from what the launchers tell, as one pure function.

A round is one set of machines at work. When one of them fails, falls silent or comes back, a new round is due: the others end their
processes, say that they are ready, and the next round begins with those that are there. Machine 0 keeps the board, so a run never
has two: a machine that cannot reach it ends its own processes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llamahome.distributed.failures import Told
from llamahome.errors import MachineError, Problem

State = Literal["ready", "running", "failed", "done"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why the processes of a machine failed."""

    error: Told
    worth: bool
    """Whether another attempt may end otherwise."""
    is_consequence: bool
    """Whether it only says that another process went away."""
    is_stop: bool = False
    """An orderly stop that nobody asked this launcher for: perhaps a new round is due and another machine knew it first."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a launcher says of its machine, about once a second."""

    node: int
    launcher: str
    """Random; two launchers that claim the same number are told apart by it."""
    machines: str
    """distributed.num_nodes as it was started with."""
    processes: int
    state: State = "ready"
    round: int = 0
    """The last one that it took part in."""
    run: str | None = None
    """Folder of the run that its processes have begun."""
    fault: Fault | None = None


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A report and when it came."""

    report: Report
    at: float


@dataclass(frozen=True, kw_only=True)
class Member:
    """A machine in a round."""

    node: int
    launcher: str
    processes: int


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Everybody is to end; without an error because all is done."""

    error: Told | None = None
    node: int | None = None
    """Where the error happened; None when it is nobody's own."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """What machine 0 has decided."""

    round: int = 0
    members: tuple[Member, ...] = ()
    """Of this round, ordered by their numbers."""
    gathering: bool = True
    """A new round is due: members end their processes."""
    gently: bool = False
    """Nothing has failed: the processes may save first."""
    invited: bool = False
    """Processes were asked to save and stop for a new round, so that a stop is not the end."""
    since: float = 0.0
    restarts: int = 0
    why: str = ""
    """What made this round necessary, in words."""
    run: str | None = None
    """Folder of the run to go on with."""
    ending: Ending | None = None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the decisions go by; times in seconds."""

    least: int
    most: int
    silence: float
    """A machine that is not heard of for so long is lost."""
    patience: float
    """How long those that are there wait for the others."""
    max_restarts: int
    not_met: Told
    """Said when too few came at the beginning; `missing` completes it."""


def decide(board: Board, heard: Mapping[int, Heard], rules: Rules, now: float) -> Board:
    """The board after a look at the latest report of each machine, by its number."""
    if board.ending is not None:
        return board
    here = {node: each.report for node, each in heard.items() if now - each.at <= rules.silence or each.report.state == "done"}
    mine = [here[member.node] for member in board.members if _is_here(member, here)]
    fatal = next((each for each in _failed(mine, board) if each.fault and not each.fault.worth), None)
    if fatal is not None and fatal.fault is not None:
        return replace(board, ending=Ending(error=fatal.fault.error, node=fatal.node))
    done = [each for each in mine if each.state == "done" and each.round == board.round]
    lost = [member.node for member in board.members if not _is_here(member, here)]
    if board.members and len(done) == len(board.members):
        return replace(board, ending=Ending())
    if board.gathering:
        return _gather(board, here, mine, rules, now)
    if lost or _failed(mine, board):
        return replace(board, gathering=True, gently=False, since=now)
    if _newcomers(board, here) and len(board.members) < rules.most and not done:
        return replace(board, gathering=True, gently=True, invited=True, since=now)
    return board


def _gather(board: Board, here: Mapping[int, Report], mine: list[Report], rules: Rules, now: float) -> Board:
    """Begin the next round when everybody who is there has ended its processes, and enough are there."""
    if any(each.state == "done" for each in mine):  # the last step is made: there is nothing to begin again for
        if any(each.state == "running" for each in mine):
            return board
        return replace(board, ending=_ending(board, here, mine, rules))
    if any(each.state == "running" for each in mine):
        failed_now = board.gently and (_failed(mine, board) or len(mine) < len(board.members))
        return replace(board, gently=False) if failed_now else board
    ready = sorted((each for each in here.values() if each.state in ("ready", "failed")), key=lambda each: each.node)
    late = now - board.since >= rules.patience
    enough = len(ready) >= rules.least and (board.round > 0 or late)
    if not enough and len(ready) < rules.most:
        return replace(board, ending=_too_few(board, ready, rules)) if late else board
    counts = board.round > 0 and bool(_failed(mine, board) or len(mine) < len(board.members))
    if counts and board.restarts >= rules.max_restarts:
        return replace(board, ending=_ending(board, here, mine, rules))
    members = tuple(Member(node=each.node, launcher=each.launcher, processes=each.processes) for each in ready)
    restarts = board.restarts + counts
    run = next((each.run for each in ready if each.run), board.run)
    why = _why(board, here, mine, rules, again=f"{restarts} of {rules.max_restarts}") if board.round else ""
    return Board(round=board.round + 1, members=members, gathering=False, since=now, restarts=restarts, why=why, run=run)


def _is_here(member: Member, here: Mapping[int, Report]) -> bool:
    return member.node in here and here[member.node].launcher == member.launcher


def _failed(mine: Iterable[Report], board: Board) -> list[Report]:
    """Those whose processes failed in this round, the cause before those that merely lost a peer."""
    here = [each for each in mine if each.state == "failed" and each.round == board.round]
    found = [each for each in here if each.fault is not None and not (board.invited and each.fault.is_stop)]
    return sorted(found, key=lambda each: each.fault is not None and each.fault.is_consequence)


def _newcomers(board: Board, here: Mapping[int, Report]) -> list[Report]:
    inside = {member.node for member in board.members}
    return [each for each in here.values() if each.node not in inside and each.state == "ready"]


def machines(numbers: Iterable[int]) -> str:
    """`machine 1`, `machines 1 and 2`."""
    names = [str(number) for number in numbers]
    return f"machine{'s' if len(names) > 1 else ''} " + " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _lost_in_words(board: Board, here: Mapping[int, Report], rules: Rules) -> str | None:
    lost = [member.node for member in board.members if not _is_here(member, here)]
    replaced = [node for node in lost if node in here]
    if replaced:
        return f"{machines(replaced)} began anew"
    return f"{machines(lost)} did not answer for {rules.silence:g} s" if lost else None


def _why(board: Board, here: Mapping[int, Report], mine: list[Report], rules: Rules, *, again: str) -> str:
    failed, silent = _failed(mine, board), _lost_in_words(board, here, rules)
    cause = silent
    if failed and failed[0].fault and (silent is None or not failed[0].fault.is_consequence):
        cause = f"machine {failed[0].node}: {failed[0].fault.error.message}"
    if cause is not None:
        return f"{cause} ({again})"
    return f"{machines(each.node for each in _newcomers(board, here))} came"


def _ending(board: Board, here: Mapping[int, Report], mine: list[Report], rules: Rules) -> Ending:
    """No further attempt is left: the cause of the last one."""
    failed, silent = _failed(mine, board), _lost_in_words(board, here, rules)
    if silent is not None and (not failed or (failed[0].fault and failed[0].fault.is_consequence)):
        message = f"{silent}, and no further attempt was left"
        return Ending(error=_machine_lost(message, "llamahome train-resume latest on all machines"))
    if failed and failed[0].fault:
        return Ending(error=failed[0].fault.error, node=failed[0].node)
    return Ending()


def _too_few(board: Board, ready: list[Report], rules: Rules) -> Ending:
    here = {each.node for each in ready}
    if board.round == 0:
        away = machines(node for node in range(rules.most) if node not in here)
        return Ending(error=replace(rules.not_met, problems=tuple(_completed(each, away) for each in rules.not_met.problems)))
    lost = machines(member.node for member in board.members if member.node not in here)
    message = f"{lost} did not answer for {rules.silence:g} s and did not come back within {rules.patience:g} s"
    hint = f"llamahome train-resume latest on all machines; with --num-nodes 1:{rules.most} those that are there would go on"
    return Ending(error=_machine_lost(message, hint))


def _machine_lost(message: str, hint: str) -> Told:
    return Told.of(MachineError(Problem(code="distributed.machine-lost", message=message, hint=hint)))


def _completed(problem: Mapping[str, Any], away: str) -> dict[str, Any]:
    return {**problem, "message": f"{problem['message']}: {away} did not come"}
