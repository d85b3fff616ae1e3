"""The pure function that decides from the reports which machines train together."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.distributed.failures import PEER_LOST, ErrorPayload
from llamahome.distributed.membership import GroupState, MemberFault, MemberReport, MembershipRules, ReceivedReport, decide, machines
from llamahome.errors import DataError, MachineError, Problem, Stopped

NOT_MET = ErrorPayload.of(MachineError(Problem(code="distributed.machines-not-met", message="they did not meet")))
RULES = MembershipRules(min_nodes=1, max_nodes=2, lost_after=12.0, join_timeout=45.0, max_restarts=3, not_met=NOT_MET)
BOTH = replace(RULES, min_nodes=2)
KILLED = MemberFault(
    error=ErrorPayload.of(MachineError(Problem(code="x.killed", message="process 1 was killed"))), retryable=True, is_consequence=False
)
LOST = MemberFault(
    error=ErrorPayload.of(MachineError(Problem(code=PEER_LOST, message="another process has left"))), retryable=True, is_consequence=True
)
BAD = MemberFault(
    error=ErrorPayload.of(DataError(Problem(code="data.empty", message="nothing there"))), retryable=False, is_consequence=False
)
STOP = MemberFault(
    error=ErrorPayload.of(Stopped(Problem(code="run.stopped", message="stopped"))), retryable=False, is_consequence=False, is_stop=True
)


def report(node, state="ready", *, round=0, fault=None, launcher=None, run=None):
    name = launcher or f"launcher {node}"
    return MemberReport(node=node, launcher=name, num_nodes="2", processes=node + 1, state=state, round=round, fault=fault, run=run)


def received_at(*reports, at=0.0):
    return {each.node: ReceivedReport(report=each, at=at) for each in reports}


def both_running(rules=RULES, *, restarts=0):
    """A group with both machines at work in round 1."""
    group = decide(GroupState(), received_at(report(0), report(1)), rules, 1.0)
    assert group.round == 1 and not group.regrouping
    return replace(group, restarts=restarts)


def running(*nodes, round=1):
    return [report(node, "running", round=round) for node in nodes]


def test_when_all_machines_are_ready_the_first_round_begins_in_the_order_of_node_ranks():
    group = decide(GroupState(), received_at(report(1), report(0)), RULES, 0.5)
    assert [(member.node, member.processes) for member in group.members] == [(0, 1), (1, 2)]
    assert (group.round, group.regrouping, group.restarts, group.reason) == (1, False, 0, "")


def test_at_the_start_the_machines_wait_join_timeout_and_then_begin_or_end():
    alone = received_at(report(0), at=44.0)
    assert decide(GroupState(), alone, RULES, 44.0) == GroupState()
    assert [member.node for member in decide(GroupState(), received_at(report(0), at=45.0), RULES, 45.0).members] == [0]
    ending = decide(GroupState(), received_at(report(0), at=45.0), BOTH, 45.0).ending
    assert ending.error.message == "they did not meet: machine 1 did not join" and ending.node is None


def test_a_short_silence_changes_nothing():
    group = both_running()
    received = {**received_at(report(0, "running", round=1), at=20.0), **received_at(report(1, "running", round=1), at=8.0)}
    assert decide(group, received, RULES, 20.0) == group


def test_the_others_go_on_without_a_silent_machine_if_min_nodes_allows():
    group = both_running()
    received = {**received_at(report(0, "running", round=1), at=20.0), **received_at(report(1, "running", round=1), at=7.0)}
    after_failure = decide(group, received, RULES, 20.0)
    assert after_failure.regrouping and not after_failure.may_save
    received |= received_at(report(0, "ready", round=1, run="output/runs/a"), at=21.0)
    after = decide(after_failure, received, RULES, 21.0)
    assert [member.node for member in after.members] == [0] and after.round == 2 and after.restarts == 1
    assert after.reason == "machine 1 did not answer for 12 s (1 of 3)" and after.run == "output/runs/a"


def test_if_both_are_needed_the_other_waits_for_the_lost_one_and_then_ends():
    after_failure = decide(both_running(), received_at(*running(0), at=20.0), BOTH, 20.0)
    here = received_at(report(0, "ready", round=1), at=64.0)
    assert decide(after_failure, here, BOTH, 64.0).ending is None
    ending = decide(after_failure, received_at(report(0, "ready", round=1), at=66.0), BOTH, 66.0).ending
    assert ending.error.problems[0]["code"] == "distributed.machine-lost" and "machine 1" in ending.error.message
    back = {**here, **received_at(report(1, launcher="another"), at=64.0)}
    assert [member.node for member in decide(after_failure, back, BOTH, 64.0).members] == [0, 1]


def test_after_a_retryable_failure_the_next_round_begins_once_all_have_ended_their_processes():
    group = both_running()
    failed = report(1, "failed", round=1, fault=KILLED)
    after_failure = decide(group, received_at(report(0, "running", round=1), failed), RULES, 2.0)
    assert (
        after_failure.regrouping and decide(after_failure, received_at(report(0, "running", round=1), failed), RULES, 3.0) == after_failure
    )
    after = decide(after_failure, received_at(report(0, "failed", round=1, fault=LOST), failed), RULES, 3.0)
    assert after.round == 2 and after.reason == "machine 1: process 1 was killed (1 of 3)"


def test_without_a_restart_left_the_group_ends_with_the_cause_not_the_consequence():
    failed = received_at(report(0, "failed", round=1, fault=LOST), report(1, "failed", round=1, fault=KILLED))
    ending = decide(decide(both_running(restarts=3), failed, RULES, 2.0), failed, RULES, 2.0).ending
    assert (ending.node, ending.error) == (1, KILLED.error)


def test_what_would_fail_again_ends_all_at_once():
    ending = decide(both_running(), received_at(report(0, "running", round=1), report(1, "failed", round=1, fault=BAD)), RULES, 2.0).ending
    assert (ending.node, ending.error) == (1, BAD.error)


def test_one_that_comes_back_is_let_in_gently_and_costs_no_restart():
    alone = replace(both_running(), members=both_running().members[:1])
    after_failure = decide(alone, received_at(*running(0), report(1)), RULES, 5.0)
    assert after_failure.regrouping and after_failure.may_save
    stopped = received_at(report(0, "failed", round=1, fault=STOP), report(1))
    after = decide(after_failure, stopped, RULES, 6.0)
    assert after.round == 2 and after.restarts == 0 and after.reason == "machine 1 joined" and len(after.members) == 2


def test_a_stop_that_no_regrouping_asked_for_ends_all():
    ending = decide(both_running(), received_at(report(0, "running", round=1), report(1, "failed", round=1, fault=STOP)), RULES, 2.0).ending
    assert ending.error.kind == "Stopped"


def test_when_all_are_done_the_group_ends_without_an_error_even_if_one_has_left():
    done = {**received_at(report(0, "done", round=1), at=90.0), **received_at(report(1, "done", round=1), at=2.0)}
    ending = decide(both_running(), done, RULES, 90.0).ending
    assert ending is not None and ending.error is None


def test_a_machine_lost_after_the_other_was_done_starts_no_new_round():
    received = {**received_at(report(0, "done", round=1), at=20.0), **received_at(report(1, "running", round=1), at=2.0)}
    group = decide(decide(both_running(), received, RULES, 20.0), received, RULES, 20.2)
    assert group.ending is not None and group.round == 1


@pytest.mark.parametrize(("numbers", "words"), [([1], "machine 1"), ([0, 2], "machines 0 and 2"), ([0, 1, 2], "machines 0, 1 and 2")])
def test_machines_are_listed(numbers, words):
    assert machines(numbers) == words


EVENTS = st.lists(st.tuples(st.sampled_from(["tick", "kill", "start", "fail", "end", "stop", "obey"]), st.integers(0, 2)), max_size=60)


@settings(deadline=None, max_examples=300)
@given(events=EVENTS, min_nodes=st.integers(1, 3))
def test_rounds_only_go_up_and_contain_the_machines_that_are_alive_and_have_ended_their_processes(events, min_nodes):
    rules = replace(RULES, min_nodes=min_nodes, max_nodes=3, max_restarts=2)
    group, now = GroupState(), 0.0
    reports: dict[int, MemberReport] = {0: report(0)}
    received = received_at(report(0))
    for event, node in events:
        now += 5.0 if event == "tick" else 0.5
        current = reports.get(node)
        if event == "kill" and node:
            reports.pop(node, None)
        elif event == "start" and current is None:
            reports[node] = report(node, launcher=f"{node} at {now}")
        elif event == "fail" and current is not None and current.state == "running":
            reports[node] = replace(current, state="failed", fault=KILLED)
        elif event == "end" and current is not None and current.state == "running":
            reports[node] = replace(current, state="done")
        elif event == "stop" and current is not None and current.state == "running" and group.may_save:
            reports[node] = replace(current, state="failed", fault=STOP)
        elif event == "obey" and current is not None:
            inside = current.launcher in {member.launcher for member in group.members}
            if current.state == "running" and (group.regrouping or group.round > current.round):
                reports[node] = replace(current, state="ready")
            elif current.state in ("ready", "failed") and inside and group.round > current.round:
                reports[node] = replace(current, state="running", round=group.round, fault=None)
        received |= {number: ReceivedReport(report=each, at=now) for number, each in reports.items()}
        before, group = group, decide(group, received, rules, now)
        assert group.round in (before.round, before.round + 1) and group.restarts <= rules.max_restarts
        assert before.ending is None or group == before
        if group.round > before.round:
            assert min_nodes <= len(group.members) <= 3 and [each.node for each in group.members] == sorted(
                each.node for each in group.members
            )
            fresh = {each.report.launcher: each.report for each in received.values() if now - each.at <= rules.lost_after}
            assert all(fresh[member.launcher].state in ("ready", "failed") for member in group.members)
            assert {member.launcher for member in group.members} >= {each.launcher for each in fresh.values() if each.state == "failed"}
