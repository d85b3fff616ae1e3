"""Which machines train together: the launcher of machine 0 decides it from the reports of all launchers, as one pure function.

A round is one set of machines at work. When a machine fails, goes silent or comes back, the group regroups: every machine ends its
processes and reports `ready`, then the next round begins with the machines that are there. Only machine 0 decides, so a run never splits in
two: a machine that cannot reach machine 0 ends its own processes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from llamahome.distributed.failures import ErrorPayload
from llamahome.errors import MachineError, Problem

State = Literal["ready", "running", "failed", "done"]


@dataclass(frozen=True, kw_only=True)
class MemberFault:
    """Why the processes of a machine failed."""

    error: ErrorPayload
    retryable: bool
    """Whether another attempt may succeed."""
    is_consequence: bool
    """Whether the processes failed only because they lost a process of another machine."""
    is_stop: bool = False
    """Whether this is an orderly stop that this launcher did not ask for: another machine may have asked for it, to regroup."""


@dataclass(frozen=True, kw_only=True)
class MemberReport:
    """What a launcher reports about its machine, once a second."""

    node: int
    launcher: str
    """Random id, which tells two launchers with the same node rank apart."""
    num_nodes: str
    """The value of distributed.num_nodes on that machine."""
    processes: int
    state: State = "ready"
    round: int = 0
    """The last round that the machine took part in."""
    run: str | None = None
    """Folder of the run that its processes work on."""
    fault: MemberFault | None = None


@dataclass(frozen=True, kw_only=True)
class ReceivedReport:
    """A report and the monotonic time at which it arrived."""

    report: MemberReport
    at: float


@dataclass(frozen=True, kw_only=True)
class Member:
    """A machine of a round."""

    node: int
    launcher: str
    processes: int


@dataclass(frozen=True, kw_only=True)
class GroupEnding:
    """All machines are to end. Without an error if the run is complete."""

    error: ErrorPayload | None = None
    node: int | None = None
    """Where the error happened; None if it belongs to no single machine."""


@dataclass(frozen=True, kw_only=True)
class GroupState:
    """What machine 0 has decided."""

    round: int = 0
    members: tuple[Member, ...] = ()
    """Machines of this round, ordered by node rank."""
    regrouping: bool = True
    """A new round is due: members end their processes."""
    may_save: bool = False
    """Nothing has failed, so the processes save before they end."""
    asked_to_stop: bool = False
    """The processes were asked to save and stop for a new round, so their stop does not end the run."""
    since: float = 0.0
    """When this round or this regrouping began, in monotonic seconds of machine 0."""
    restarts: int = 0
    reason: str = ""
    """Why this round became necessary, for people."""
    run: str | None = None
    """Folder of the run to resume."""
    ending: GroupEnding | None = None


@dataclass(frozen=True, kw_only=True)
class MembershipRules:
    """The limits that `decide` follows; times in seconds."""

    min_nodes: int
    max_nodes: int
    lost_after: float
    """A machine that has sent no report for so long is lost."""
    join_timeout: float
    """How long the machines that are there wait for the others."""
    max_restarts: int
    not_met: ErrorPayload
    """The error if too few machines join at the start; `decide` adds who is missing."""


def decide(group: GroupState, received: Mapping[int, ReceivedReport], rules: MembershipRules, now: float) -> GroupState:
    """The next group state, given the latest report of each node."""
    if group.ending is not None:
        return group
    alive = {node: each.report for node, each in received.items() if now - each.at <= rules.lost_after or each.report.state == "done"}
    members = [alive[member.node] for member in group.members if _is_alive(member, alive)]
    failed = _failed(members, group)
    fatal = next((each for each in failed if each.fault and not each.fault.retryable), None)
    if fatal is not None and fatal.fault is not None:
        return replace(group, ending=GroupEnding(error=fatal.fault.error, node=fatal.node))
    done = [each for each in members if each.state == "done" and each.round == group.round]
    if group.members and len(done) == len(group.members):
        return replace(group, ending=GroupEnding())
    if group.regrouping:
        return _regroup(group, alive, members, rules, now)
    if failed or len(members) < len(group.members):
        return replace(group, regrouping=True, may_save=False, since=now)
    if _newcomers(group, alive) and len(group.members) < rules.max_nodes and not done:
        return replace(group, regrouping=True, may_save=True, asked_to_stop=True, since=now)
    return group


def _regroup(
    group: GroupState, alive: Mapping[int, MemberReport], members: list[MemberReport], rules: MembershipRules, now: float
) -> GroupState:
    """Begin the next round when all members have ended their processes and enough machines are ready."""
    running = any(each.state == "running" for each in members)
    if any(each.state == "done" for each in members):  # the last step is made, so another round would have nothing to do
        return group if running else replace(group, ending=_ending(group, alive, members, rules))
    has_failed = bool(_failed(members, group)) or len(members) < len(group.members)
    if running:
        return replace(group, may_save=False) if group.may_save and has_failed else group
    ready = sorted((each for each in alive.values() if each.state in ("ready", "failed")), key=lambda each: each.node)
    late = now - group.since >= rules.join_timeout
    enough = len(ready) >= rules.min_nodes and (group.round > 0 or late)
    if not enough and len(ready) < rules.max_nodes:
        return replace(group, ending=_too_few(group, ready, rules)) if late else group
    counts_as_restart = group.round > 0 and has_failed
    if counts_as_restart and group.restarts >= rules.max_restarts:
        return replace(group, ending=_ending(group, alive, members, rules))
    restarts = group.restarts + counts_as_restart
    return GroupState(
        round=group.round + 1,
        members=tuple(Member(node=each.node, launcher=each.launcher, processes=each.processes) for each in ready),
        regrouping=False,
        since=now,
        restarts=restarts,
        reason=_reason(group, alive, members, rules, attempt=f"{restarts} of {rules.max_restarts}") if group.round else "",
        run=next((each.run for each in ready if each.run), group.run),
    )


def _is_alive(member: Member, alive: Mapping[int, MemberReport]) -> bool:
    return member.node in alive and alive[member.node].launcher == member.launcher


def _failed(members: Iterable[MemberReport], group: GroupState) -> list[MemberReport]:
    """The members whose processes failed in this round, causes before consequences."""
    faults = [(each, each.fault) for each in members if each.state == "failed" and each.round == group.round and each.fault is not None]
    counted = [(each, fault) for each, fault in faults if not (group.asked_to_stop and fault.is_stop)]
    return [each for each, fault in sorted(counted, key=lambda pair: pair[1].is_consequence)]


def _newcomers(group: GroupState, alive: Mapping[int, MemberReport]) -> list[MemberReport]:
    nodes = {member.node for member in group.members}
    return [each for each in alive.values() if each.node not in nodes and each.state == "ready"]


def machines(nodes: Iterable[int]) -> str:
    """`machine 1`, `machines 1 and 2`."""
    names = [str(node) for node in nodes]
    return f"machine{'s' if len(names) > 1 else ''} " + " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _lost(group: GroupState, alive: Mapping[int, MemberReport], rules: MembershipRules) -> str | None:
    """A sentence about the members that are lost, or None."""
    lost = [member.node for member in group.members if not _is_alive(member, alive)]
    restarted = [node for node in lost if node in alive]
    if restarted:
        return f"{machines(restarted)} started again"
    return f"{machines(lost)} did not answer for {rules.lost_after:g} s" if lost else None


def _reason(
    group: GroupState, alive: Mapping[int, MemberReport], members: list[MemberReport], rules: MembershipRules, *, attempt: str
) -> str:
    failed, cause = _failed(members, group), _lost(group, alive, rules)
    if failed and failed[0].fault and (cause is None or not failed[0].fault.is_consequence):
        cause = f"machine {failed[0].node}: {failed[0].fault.error.message}"
    if cause is not None:
        return f"{cause} ({attempt})"
    return f"{machines(each.node for each in _newcomers(group, alive))} joined"


def _ending(group: GroupState, alive: Mapping[int, MemberReport], members: list[MemberReport], rules: MembershipRules) -> GroupEnding:
    """The ending if no restart is left: the cause of the last failure."""
    failed, lost = _failed(members, group), _lost(group, alive, rules)
    if lost is not None and (not failed or (failed[0].fault and failed[0].fault.is_consequence)):
        return GroupEnding(error=_machine_lost(f"{lost}, and no restart was left", "llamahome train-resume latest on all machines"))
    if failed and failed[0].fault:
        return GroupEnding(error=failed[0].fault.error, node=failed[0].node)
    return GroupEnding()


def _too_few(group: GroupState, ready: list[MemberReport], rules: MembershipRules) -> GroupEnding:
    nodes = {each.node for each in ready}
    if group.round == 0:
        missing = machines(node for node in range(rules.max_nodes) if node not in nodes)
        problems = tuple({**each, "message": f"{each['message']}: {missing} did not join"} for each in rules.not_met.problems)
        return GroupEnding(error=replace(rules.not_met, problems=problems))
    lost = machines(member.node for member in group.members if member.node not in nodes)
    message = f"{lost} did not answer for {rules.lost_after:g} s and did not come back within {rules.join_timeout:g} s"
    hint = f"llamahome train-resume latest on all machines; with --num-nodes 1:{rules.max_nodes} the others would go on"
    return GroupEnding(error=_machine_lost(message, hint))


def _machine_lost(message: str, hint: str) -> ErrorPayload:
    return ErrorPayload.of(MachineError(Problem(code="distributed.machine-lost", message=message, hint=hint)))
