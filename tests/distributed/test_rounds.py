"""The function that decides which machines train together, as pure code: told reports, it answers with a board."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.distributed.failures import PEER_LOST, Told
from llamahome.distributed.rounds import Board, Fault, Heard, Report, Rules, decide, machines
from llamahome.errors import DataError, MachineError, Problem, Stopped

NOT_MET = Told.of(MachineError(Problem(code="distributed.machines-not-met", message="they did not meet")))
RULES = Rules(least=1, most=2, silence=12.0, patience=45.0, max_restarts=3, not_met=NOT_MET)
BOTH = replace(RULES, least=2)
KILLED = Fault(error=Told.of(MachineError(Problem(code="x.killed", message="process 1 was killed"))), worth=True, is_consequence=False)
LOST = Fault(error=Told.of(MachineError(Problem(code=PEER_LOST, message="another process has left"))), worth=True, is_consequence=True)
BAD = Fault(error=Told.of(DataError(Problem(code="data.empty", message="nothing there"))), worth=False, is_consequence=False)
STOP = Fault(error=Told.of(Stopped(Problem(code="run.stopped", message="stopped"))), worth=False, is_consequence=False, is_stop=True)


def report(node, state="ready", *, round=0, fault=None, launcher=None, run=None):
    name = launcher or f"launcher {node}"
    return Report(node=node, launcher=name, machines="2", processes=node + 1, state=state, round=round, fault=fault, run=run)


def seen(*reports, at=0.0):
    return {each.node: Heard(report=each, at=at) for each in reports}


def at_work(rules=RULES, *, restarts=0):
    """A board with both machines at work in round 1."""
    board = decide(Board(), seen(report(0), report(1)), rules, 1.0)
    assert board.round == 1 and not board.gathering
    return replace(board, restarts=restarts)


def working(*nodes, round=1):
    return [report(node, "running", round=round) for node in nodes]


def test_when_all_have_come_the_first_round_begins_in_the_order_of_their_numbers():
    board = decide(Board(), seen(report(1), report(0)), RULES, 0.5)
    assert [(member.node, member.processes) for member in board.members] == [(0, 1), (1, 2)]
    assert (board.round, board.gathering, board.restarts, board.why) == (1, False, 0, "")


def test_at_the_beginning_too_few_wait_for_the_others_and_then_go_on_or_end():
    alone = seen(report(0), at=44.0)
    assert decide(Board(), alone, RULES, 44.0) == Board()
    assert [member.node for member in decide(Board(), seen(report(0), at=45.0), RULES, 45.0).members] == [0]
    ending = decide(Board(), seen(report(0), at=45.0), BOTH, 45.0).ending
    assert ending.error.message == "they did not meet: machine 1 did not come" and ending.node is None


def test_a_silence_that_is_short_changes_nothing():
    board = at_work()
    heard = {**seen(report(0, "running", round=1), at=20.0), **seen(report(1, "running", round=1), at=8.0)}
    assert decide(board, heard, RULES, 20.0) == board


def test_a_silent_machine_is_gone_without_where_that_is_allowed():
    board = at_work()
    heard = {**seen(report(0, "running", round=1), at=20.0), **seen(report(1, "running", round=1), at=7.0)}
    gathering = decide(board, heard, RULES, 20.0)
    assert gathering.gathering and not gathering.gently
    heard |= seen(report(0, "ready", round=1, run="output/runs/a"), at=21.0)
    after = decide(gathering, heard, RULES, 21.0)
    assert [member.node for member in after.members] == [0] and after.round == 2 and after.restarts == 1
    assert after.why == "machine 1 did not answer for 12 s (1 of 3)" and after.run == "output/runs/a"


def test_where_both_are_needed_the_other_waits_for_the_lost_one_and_then_ends():
    gathering = decide(at_work(), seen(*working(0), at=20.0), BOTH, 20.0)
    here = seen(report(0, "ready", round=1), at=64.0)
    assert decide(gathering, here, BOTH, 64.0).ending is None
    ending = decide(gathering, seen(report(0, "ready", round=1), at=66.0), BOTH, 66.0).ending
    assert ending.error.problems[0]["code"] == "distributed.machine-lost" and "machine 1" in ending.error.message
    back = {**here, **seen(report(1, launcher="another"), at=64.0)}
    assert [member.node for member in decide(gathering, back, BOTH, 64.0).members] == [0, 1]


def test_a_failure_worth_another_attempt_begins_a_round_once_everybody_has_ended_its_processes():
    board = at_work()
    failed = report(1, "failed", round=1, fault=KILLED)
    gathering = decide(board, seen(report(0, "running", round=1), failed), RULES, 2.0)
    assert gathering.gathering and decide(gathering, seen(report(0, "running", round=1), failed), RULES, 3.0) == gathering
    after = decide(gathering, seen(report(0, "failed", round=1, fault=LOST), failed), RULES, 3.0)
    assert after.round == 2 and after.why == "machine 1: process 1 was killed (1 of 3)"


def test_without_an_attempt_left_the_cause_ends_all_and_not_its_consequence():
    failed = seen(report(0, "failed", round=1, fault=LOST), report(1, "failed", round=1, fault=KILLED))
    ending = decide(decide(at_work(restarts=3), failed, RULES, 2.0), failed, RULES, 2.0).ending
    assert (ending.node, ending.error) == (1, KILLED.error)


def test_what_would_fail_again_ends_all_at_once():
    ending = decide(at_work(), seen(report(0, "running", round=1), report(1, "failed", round=1, fault=BAD)), RULES, 2.0).ending
    assert (ending.node, ending.error) == (1, BAD.error)


def test_one_that_comes_back_is_let_in_gently_and_costs_no_restart():
    alone = replace(at_work(), members=at_work().members[:1])
    gathering = decide(alone, seen(*working(0), report(1)), RULES, 5.0)
    assert gathering.gathering and gathering.gently
    stopped = seen(report(0, "failed", round=1, fault=STOP), report(1))
    after = decide(gathering, stopped, RULES, 6.0)
    assert after.round == 2 and after.restarts == 0 and after.why == "machine 1 came" and len(after.members) == 2


def test_a_stop_that_a_new_round_did_not_ask_for_ends_all():
    ending = decide(at_work(), seen(report(0, "running", round=1), report(1, "failed", round=1, fault=STOP)), RULES, 2.0).ending
    assert ending.error.kind == "Stopped"


def test_when_all_are_done_all_end_without_an_error_even_if_one_has_left():
    done = {**seen(report(0, "done", round=1), at=90.0), **seen(report(1, "done", round=1), at=2.0)}
    ending = decide(at_work(), done, RULES, 90.0).ending
    assert ending is not None and ending.error is None


def test_a_machine_that_is_lost_after_the_other_was_done_begins_nothing_again():
    heard = {**seen(report(0, "done", round=1), at=20.0), **seen(report(1, "running", round=1), at=2.0)}
    board = decide(decide(at_work(), heard, RULES, 20.0), heard, RULES, 20.2)
    assert board.ending is not None and board.round == 1


@pytest.mark.parametrize(("numbers", "words"), [([1], "machine 1"), ([0, 2], "machines 0 and 2"), ([0, 1, 2], "machines 0, 1 and 2")])
def test_machines_are_named(numbers, words):
    assert machines(numbers) == words


EVENTS = st.lists(st.tuples(st.sampled_from(["tick", "kill", "start", "fail", "end", "stop", "obey"]), st.integers(0, 2)), max_size=60)


@settings(deadline=None, max_examples=300)
@given(events=EVENTS, least=st.integers(1, 3))
def test_whatever_happens_rounds_only_go_up_and_hold_those_who_are_there_and_have_ended_their_processes(events, least):
    rules = replace(RULES, least=least, most=3, max_restarts=2)
    board, now = Board(), 0.0
    told: dict[int, Report] = {0: report(0)}
    heard = seen(report(0))
    for event, node in events:
        now += 5.0 if event == "tick" else 0.5
        mine = told.get(node)
        if event == "kill" and node:
            told.pop(node, None)
        elif event == "start" and mine is None:
            told[node] = report(node, launcher=f"{node} at {now}")
        elif event == "fail" and mine is not None and mine.state == "running":
            told[node] = replace(mine, state="failed", fault=KILLED)
        elif event == "end" and mine is not None and mine.state == "running":
            told[node] = replace(mine, state="done")
        elif event == "stop" and mine is not None and mine.state == "running" and board.gently:
            told[node] = replace(mine, state="failed", fault=STOP)
        elif event == "obey" and mine is not None:
            inside = mine.launcher in {member.launcher for member in board.members}
            if mine.state == "running" and (board.gathering or board.round > mine.round):
                told[node] = replace(mine, state="ready")
            elif mine.state in ("ready", "failed") and inside and board.round > mine.round:
                told[node] = replace(mine, state="running", round=board.round, fault=None)
        heard |= {number: Heard(report=each, at=now) for number, each in told.items()}
        before, board = board, decide(board, heard, rules, now)
        assert board.round in (before.round, before.round + 1) and board.restarts <= rules.max_restarts
        assert before.ending is None or board == before
        if board.round > before.round:
            assert least <= len(board.members) <= 3 and [each.node for each in board.members] == sorted(each.node for each in board.members)
            fresh = {each.report.launcher: each.report for each in heard.values() if now - each.at <= rules.silence}
            assert all(fresh[member.launcher].state in ("ready", "failed") for member in board.members)
            assert {member.launcher for member in board.members} >= {each.launcher for each in fresh.values() if each.state == "failed"}
