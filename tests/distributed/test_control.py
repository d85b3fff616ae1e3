"""Launchers exchange reports and the group state over loopback; other programs that connect change nothing."""

import socket
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
from tests.support.workers import free_port

from llamahome.distributed.connect import interface_to, is_own_address
from llamahome.distributed.control import Client, Reply, Server, new_launcher_id
from llamahome.distributed.failures import ErrorPayload
from llamahome.distributed.membership import MemberFault, MemberReport, MembershipRules
from llamahome.errors import DataError, MachineError, Problem

NOT_MET = ErrorPayload.of(MachineError(Problem(code="distributed.machines-not-met", message="they did not meet")))
RULES = MembershipRules(min_nodes=2, max_nodes=2, lost_after=12.0, join_timeout=45.0, max_restarts=3, not_met=NOT_MET)


def report(node, num_nodes="2"):
    return MemberReport(node=node, launcher=new_launcher_id(), num_nodes=num_nodes, processes=1)


class Group:
    """A server on a free port and its clients; all are closed at the end."""

    def __init__(self, stack):
        self._stack, self.port, self.first = stack, free_port(), report(0)
        self.server = Server(self.first, RULES, port=self.port, store_port=7)
        stack.callback(self.server.close)

    def client(self, report):
        client = Client(report, address="127.0.0.1", port=self.port)
        self._stack.callback(client.close)
        return client


@pytest.fixture
def group():
    with ExitStack() as stack:
        yield Group(stack)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def reply_of(client):
    return client.reply or Reply()


def test_both_machines_get_the_same_group_state_and_the_port_of_the_store(group):
    client = group.client(report(1))
    wait_for(lambda: reply_of(client).group.round == 1)
    assert [member.node for member in reply_of(client).group.members] == [0, 1] and client.reply.store_port == 7
    assert client.reply.group == group.server.reply.group and client.silent_s == 0.0


def test_an_error_reaches_the_other_machine_unchanged(group):
    mine = report(1)
    client = group.client(mine)
    wait_for(lambda: reply_of(client).group.round == 1)
    error = DataError([Problem(code="data.bad-json", message="räven", where="a:1", excerpt="{", hint="repair it")])
    fault = MemberFault(error=ErrorPayload.of(error), retryable=False, is_consequence=False)
    client.send(replace(mine, state="failed", round=1, fault=fault))
    wait_for(lambda: group.server.reply.group.ending is not None)
    ending = group.server.reply.group.ending
    assert ending.node == 1 and type(ending.error.error()) is DataError and ending.error.error().problems == error.problems
    wait_for(lambda: reply_of(client).group.ending == ending)


def test_a_second_machine_with_the_same_node_rank_is_rejected_and_the_first_stays(group):
    first = group.client(report(1))
    wait_for(lambda: reply_of(first).group.round == 1)
    second, zero = group.client(report(1)), group.client(report(0))
    for client in (second, zero):
        wait_for(lambda client=client: reply_of(client).rejection is not None)
        assert client.reply.rejection.problems[0]["code"] == "distributed.node-rank-twice"
    assert reply_of(first).rejection is None and not group.server.reply.group.regrouping


def test_a_launcher_that_leaves_frees_its_node_rank_at_once(group):
    first = group.client(report(1))
    wait_for(lambda: reply_of(first).group.round == 1)
    first.close()
    second = group.client(report(1))
    wait_for(lambda: group.server.reply.group.round == 2)
    assert reply_of(second).rejection is None


def test_a_different_number_of_machines_is_rejected(group):
    client = group.client(report(1, num_nodes="3"))
    wait_for(lambda: reply_of(client).rejection is not None)
    assert client.reply.rejection.problems[0]["code"] == "distributed.ranks-differ"
    assert "3 machines" in client.reply.rejection.message


def test_an_address_of_this_machine_is_not_searched_for_a_second_server(group):
    port = free_port()
    second = Server(report(0), RULES, port=port, store_port=7)
    second.reject_second_server("127.0.0.1", group.port)
    assert is_own_address("127.0.0.1") and second.reply.rejection is None
    second.close()


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"report": 3}\n', b"[]\n", b"\xff\n", b'{"report": {"node": 1}}\n'])
def test_a_program_that_is_no_launcher_gets_no_answer_and_changes_nothing(group, noise):
    with socket.create_connection(("127.0.0.1", group.port), timeout=5) as other:
        other.sendall(noise)
        other.shutdown(socket.SHUT_WR)
        assert other.recv(100) == b""
    client = group.client(report(1))
    wait_for(lambda: reply_of(client).group.round == 1)


def test_silence_is_counted_until_a_reply_arrives():
    port = free_port()
    client = Client(report(1), address="127.0.0.1", port=port)
    wait_for(lambda: client.silent_s > 1.5)
    assert client.reply is None and client.last_error
    server = Server(report(0), RULES, port=port, store_port=7)
    wait_for(lambda: client.reply is not None)
    assert client.silent_s == 0.0
    client.close()
    server.close()


def test_the_interface_is_the_one_that_has_the_address_or_routes_to_it():
    names = {name for _, name in socket.if_nameindex()}
    assert interface_to("127.0.0.1") in names and interface_to("127.0.0.1").startswith("lo")
    assert interface_to("no such name.invalid") is None and not is_own_address("192.0.2.77")
    assert interface_to("192.0.2.77") in {*names, None}
