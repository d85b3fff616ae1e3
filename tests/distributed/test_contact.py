"""Launchers that talk over loopback: what one tells the others know, and what is no launcher disturbs nobody."""

import socket
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
from tests.support.workers import free_port

from llamahome.distributed.contact import Guest, Host, Word, new_launcher
from llamahome.distributed.failures import Told
from llamahome.distributed.interfaces import is_own, route_to
from llamahome.distributed.rounds import Fault, Report, Rules
from llamahome.errors import DataError, MachineError, Problem

NOT_MET = Told.of(MachineError(Problem(code="distributed.machines-not-met", message="they did not meet")))
RULES = Rules(least=2, most=2, silence=12.0, patience=45.0, max_restarts=3, not_met=NOT_MET)


def report(node, machines="2"):
    return Report(node=node, launcher=new_launcher(), machines=machines, processes=1)


class Meeting:
    """A machine 0 and its guests on a free port, all closed in the end."""

    def __init__(self, stack):
        self._stack, self.port, self.first = stack, free_port(), report(0)
        self.host = Host(self.first, RULES, port=self.port, store_port=7)
        stack.callback(self.host.close)

    def guest(self, told):
        guest = Guest(told, address="127.0.0.1", port=self.port)
        self._stack.callback(guest.close)
        return guest


@pytest.fixture
def meeting():
    with ExitStack() as stack:
        yield Meeting(stack)


def soon(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def word(guest):
    return guest.word or Word()


def test_both_come_to_the_same_board_and_know_where_the_processes_meet(meeting):
    guest = meeting.guest(report(1))
    soon(lambda: word(guest).board.round == 1)
    assert [member.node for member in word(guest).board.members] == [0, 1] and guest.word.store_port == 7
    assert guest.word.board == meeting.host.word.board and guest.silence == 0.0


def test_an_error_reaches_the_other_machine_as_it_was(meeting):
    mine = report(1)
    guest = meeting.guest(mine)
    soon(lambda: word(guest).board.round == 1)
    error = DataError([Problem(code="data.bad-json", message="räven", where="a:1", excerpt="{", hint="mend it")])
    fault = Fault(error=Told.of(error), worth=False, is_consequence=False)
    guest.tell(replace(mine, state="failed", round=1, fault=fault))
    soon(lambda: meeting.host.word.board.ending is not None)
    ending = meeting.host.word.board.ending
    assert ending.node == 1 and type(ending.error.error()) is DataError and ending.error.error().problems == error.problems
    soon(lambda: word(guest).board.ending == ending)


def test_a_number_given_twice_is_refused_and_the_first_keeps_its_place(meeting):
    first = meeting.guest(report(1))
    soon(lambda: word(first).board.round == 1)
    second, zero = meeting.guest(report(1)), meeting.guest(report(0))
    for guest in (second, zero):
        soon(lambda guest=guest: word(guest).refused is not None)
        assert guest.word.refused.problems[0]["code"] == "distributed.node-rank-twice"
    assert word(first).refused is None and not meeting.host.word.board.gathering


def test_a_launcher_that_takes_leave_frees_its_number_at_once(meeting):
    first = meeting.guest(report(1))
    soon(lambda: word(first).board.round == 1)
    first.close()
    second = meeting.guest(report(1))
    soon(lambda: meeting.host.word.board.round == 2)
    assert word(second).refused is None


def test_another_count_of_machines_is_told(meeting):
    guest = meeting.guest(report(1, machines="3"))
    soon(lambda: word(guest).refused is not None)
    assert guest.word.refused.problems[0]["code"] == "distributed.ranks-differ"
    assert "3 machines" in guest.word.refused.message


def test_a_second_machine_0_finds_the_first(meeting):
    port = free_port()
    second = Host(report(0), RULES, port=port, store_port=7)
    second.look_for_another("127.0.0.1", meeting.port)  # the address is this machine's, so another port may be anything
    assert is_own("127.0.0.1") and second.word.refused is None
    second.close()


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"report": 3}\n', b"[]\n", b"\xff\n", b'{"report": {"node": 1}}\n'])
def test_what_is_no_launcher_is_not_answered_and_disturbs_nobody(meeting, noise):
    with socket.create_connection(("127.0.0.1", meeting.port), timeout=5) as stranger:
        stranger.sendall(noise)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
    guest = meeting.guest(report(1))
    soon(lambda: word(guest).board.round == 1)


def test_silence_is_counted_while_nobody_answers_and_an_answer_ends_it():
    port = free_port()
    guest = Guest(report(1), address="127.0.0.1", port=port)
    soon(lambda: guest.silence > 1.5)
    assert guest.word is None and guest.last_trouble
    host = Host(report(0), RULES, port=port, store_port=7)
    soon(lambda: guest.word is not None)
    assert guest.silence == 0.0
    guest.close()
    host.close()


def test_the_interface_is_the_one_of_the_address_or_of_the_way_to_it():
    names = {name for _, name in socket.if_nameindex()}
    assert route_to("127.0.0.1") in names and route_to("127.0.0.1").startswith("lo")
    assert route_to("no such name.invalid") is None and not is_own("192.0.2.77")
    assert route_to("192.0.2.77") in {*names, None}
