"""How the launchers of several machines talk: once a second each one sends its report to machine 0 and gets the group state back.

Each exchange is one line of JSON in both directions over a new connection with short timeouts. So a cut cable blocks nobody, and the next
exchange works again once the cable is back. Machine 0 keeps the group state in memory; when machine 0 is lost, the others end.
"""

import errno
import json
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from llamahome.distributed.connect import is_own_address
from llamahome.distributed.failures import ErrorPayload
from llamahome.distributed.membership import GroupState, MemberReport, MembershipRules, ReceivedReport, decide
from llamahome.errors import ConfigError, Problem

REPORT_EVERY_S = 1.0
LOST_AFTER_S = 12.0
"""A machine that is silent for so long is lost. Longer than a cable that is out for 5 s plus the next retransmission of TCP."""
_TIMEOUT_S = 2.0
_POLL_S = 0.2
_STALLED_S = 2.0
"""If this launcher itself was paused for so long (process or machine suspended), the pause does not count as silence of others."""
_CLOSING_S = 5.0
_LONGEST_LINE = 2**20


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What machine 0 answers to a report."""

    group: GroupState = field(default_factory=GroupState)
    store_port: int = 0
    """Port of the store in which the processes of a round meet."""
    rejection: ErrorPayload | None = None
    """Why this launcher cannot take part."""


_REPORTS, _REPLIES = TypeAdapter(MemberReport), TypeAdapter(Reply)


class Server:
    """The launcher of machine 0: it receives reports, decides and answers. It has the same interface as `Client`."""

    last_error = ""
    silent_s = 0.0

    def __init__(self, report: MemberReport, rules: MembershipRules, *, port: int, store_port: int) -> None:
        """Listen on `port` of all interfaces. Raises OSError if the port is taken."""
        self._rules, self._own = rules, report
        self._reply = Reply(group=GroupState(since=time.monotonic()), store_port=store_port)
        self._received: dict[int, ReceivedReport] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._know_the_ending: set[str] = set()
        self._updated_at = time.monotonic()
        self._socket = _listen(port)
        self._socket.settimeout(_POLL_S)
        threading.Thread(target=self._serve, name="machine-0", daemon=True).start()

    def send(self, report: MemberReport) -> None:
        """Take the report of this machine into account."""
        with self._lock:
            self._own = report
            self._update()

    @property
    def reply(self) -> Reply:
        """The current decision."""
        with self._lock:
            return self._reply

    def reject_second_server(self, address: str, port: int) -> None:
        """If `address` belongs to another machine and a machine 0 answers there, two machines were started with node rank 0."""

        def look() -> None:
            while not self._closed.wait(REPORT_EVERY_S) and not self.reply.group.round:
                try:
                    answer = _exchange(address, port, {"who": self._own.launcher})
                except (OSError, ValueError):
                    continue
                if "server" in answer and answer["server"] != self._own.launcher:
                    with self._lock:
                        self._reply = replace(self._reply, rejection=_duplicate_rank(0))
                return

        if not is_own_address(address):
            threading.Thread(target=look, name="second-machine-0", daemon=True).start()

    def close(self) -> None:
        """Stop listening once all other launchers know the ending or have gone silent."""
        deadline = time.monotonic() + _CLOSING_S
        while self.reply.group.ending is not None and time.monotonic() < deadline and self._someone_is_uninformed():
            time.sleep(_POLL_S)
        self._closed.set()
        self._socket.close()

    def _someone_is_uninformed(self) -> bool:
        with self._lock:
            now = time.monotonic()
            present = [each.report for each in self._received.values() if now - each.at < 3 * REPORT_EVERY_S]
            return any(each.launcher not in self._know_the_ending and each.node != self._own.node for each in present)

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                pass
            except OSError:
                return  # closed
            else:
                threading.Thread(target=self._answer, args=(connection,), name="machine-0-answer", daemon=True).start()
            with self._lock:
                self._update()

    def _update(self) -> None:
        now = time.monotonic()
        paused, self._updated_at = now - self._updated_at, now
        if paused > _STALLED_S:
            self._received = {node: replace(each, at=each.at + paused) for node, each in self._received.items()}
        self._received[self._own.node] = ReceivedReport(report=self._own, at=now)
        self._reply = replace(self._reply, group=decide(self._reply.group, self._received, self._rules, now))

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(_TIMEOUT_S)
            try:
                message = _read_line(connection)
                answer = self._answer_to(message)
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except (OSError, ValueError, KeyError):
                return  # no launcher, or one that has gone
            if "report" in message and self.reply.group.ending is not None:
                with self._lock:
                    self._know_the_ending.add(str(message["report"]["launcher"]))

    def _answer_to(self, message: dict[str, Any]) -> dict[str, Any]:
        if "who" in message:
            return {"server": self._own.launcher}
        report = _REPORTS.validate_python(message["report"])
        with self._lock:
            if message.get("leaves"):
                if report.node in self._received and self._received[report.node].report.launcher == report.launcher:
                    del self._received[report.node]
                return {}
            rejection = self._rejection(report)
            if rejection is None:
                self._received[report.node] = ReceivedReport(report=report, at=time.monotonic())
                self._update()
            return asdict(replace(self._reply, rejection=rejection))

    def _rejection(self, report: MemberReport) -> ErrorPayload | None:
        if report.num_nodes != self._own.num_nodes:
            message = f"machine {report.node} was started for {report.num_nodes} machines, machine 0 for {self._own.num_nodes}"
            hint = f"--num-nodes {self._own.num_nodes} on all machines"
            problem = Problem(code="distributed.ranks-differ", message=message, where="distributed.num_nodes", hint=hint)
            return ErrorPayload.of(ConfigError(problem))
        known = self._received.get(report.node)
        if known is None or known.report.launcher == report.launcher:
            return None
        is_present = time.monotonic() - known.at <= self._rules.lost_after and known.report.state != "done"
        return _duplicate_rank(report.node) if is_present or report.node == self._own.node else None


class Client:
    """The launcher of any other machine: a thread sends its report once a second."""

    def __init__(self, report: MemberReport, *, address: str, port: int) -> None:
        self._name, self._report = (address, port), report
        self._address = self._name
        """The numeric address, once machine 0 has answered, because a name cannot be resolved over a cut cable."""
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), threading.Event()
        self._reply: Reply | None = None
        self._silent_s = 0.0
        self.last_error = ""
        threading.Thread(target=self._run, name="to-machine-0", daemon=True).start()

    def send(self, report: MemberReport) -> None:
        """Send `report` now, and again every second."""
        with self._lock:
            self._report = report
        self._wake.set()

    @property
    def reply(self) -> Reply | None:
        """The last reply; None before the first."""
        with self._lock:
            return self._reply

    @property
    def silent_s(self) -> float:
        """Seconds since the last reply."""
        with self._lock:
            return self._silent_s

    def close(self) -> None:
        """Tell machine 0, if it answers, that this launcher leaves."""
        self._closed.set()
        self._wake.set()
        if self._report.state == "done":
            return
        try:
            _exchange(*self._address, {"report": asdict(self._report), "leaves": True})
        except (OSError, ValueError):
            return

    def _run(self) -> None:
        tried_at = time.monotonic()
        while not self._closed.is_set():
            with self._lock:
                report = self._report
            try:
                if self._reply is None:
                    self._address = (str(socket.getaddrinfo(*self._name, type=socket.SOCK_STREAM)[0][4][0]), self._name[1])
                reply = _REPLIES.validate_python(_exchange(*self._address, {"report": asdict(report)}))
            except (OSError, ValueError) as error:
                reply, self.last_error = None, str(error) or type(error).__name__
            now = time.monotonic()
            with self._lock:
                self._silent_s = 0.0 if reply is not None else self._silent_s + min(now - tried_at, REPORT_EVERY_S + 2 * _TIMEOUT_S)
                self._reply = reply or self._reply
            tried_at = now
            self._wake.wait(REPORT_EVERY_S)
            self._wake.clear()


def new_launcher_id() -> str:
    """A random id."""
    return secrets.token_hex(8)


def _duplicate_rank(node: int) -> ErrorPayload:
    where = "at distributed.master_addr" if node == 0 else "known to machine 0"
    message = f"another machine with node rank {node} is {where}: each machine needs its own node rank"
    hint = "--node-rank: 0 on the machine of --master-addr, then 1, 2, ..."
    problem = Problem(code="distributed.node-rank-twice", message=message, where="distributed.node_rank", hint=hint)
    return ErrorPayload.of(ConfigError(problem))


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # IPv6 is built in but switched off
                raise
    return socket.create_server(("", port))


def _exchange(address: str, port: int, message: dict[str, Any]) -> dict[str, Any]:
    """Send one line, read one line. Raises OSError if nobody answers in time, ValueError if the answer is not from a launcher."""
    with socket.create_connection((address, port), timeout=_TIMEOUT_S) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.sendall(json.dumps(message).encode() + b"\n")
        return _read_line(connection)


def _read_line(connection: socket.socket) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(2**16)
        line += part
        if not part or len(line) > _LONGEST_LINE:
            raise ValueError("the other side is not a launcher of llamahome")
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError("the other side is not a launcher of llamahome")
    return content
