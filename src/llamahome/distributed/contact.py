"""How the launchers of several machines talk: once a second each tells machine 0 of itself and hears what was decided.

A line of JSON each way over a fresh connection with short time-outs, so that a cut cable hangs nobody and a cable that is back is
noticed at the next try. Machine 0 keeps the board in its own memory; where it is lost, the others end.
"""

import errno
import json
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llamahome.distributed.failures import Told
from llamahome.distributed.interfaces import is_own
from llamahome.distributed.rounds import Board, Ending, Fault, Heard, Member, Report, Rules, decide
from llamahome.errors import ConfigError, Problem

BEAT_S = 1.0
SILENCE_S = 12.0
"""Without a word for so long, a machine is lost: more than a cable that is out for 5 s and TCP's next try after it."""
_ANSWER_S = 2.0
_TICK_S = 0.2
_STALL_S = 2.0
"""A pause of this launcher itself (a stopped process, a machine asleep) is nobody's silence."""
_FAREWELL_S = 5.0
_LONGEST_LINE = 2**20


@dataclass(frozen=True, kw_only=True)
class Word:
    """What machine 0 answers."""

    board: Board = field(default_factory=Board)
    store_port: int = 0
    """Where the processes of a round meet."""
    refused: Told | None = None
    """Why this launcher cannot take part."""


class Host:
    """Machine 0's end: it listens, keeps the board, and is never out of contact with itself."""

    last_trouble = ""

    def __init__(self, report: Report, rules: Rules, *, port: int, store_port: int) -> None:
        """Listen on `port` of all interfaces; OSError when it is taken."""
        self._rules, self._own = rules, report
        self._word = Word(board=Board(since=time.monotonic()), store_port=store_port)
        self._heard: dict[int, Heard] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._know_the_end: set[str] = set()
        self._looked = time.monotonic()
        self._server = _listen(port)
        self._server.settimeout(_TICK_S)
        threading.Thread(target=self._serve, name="machine-0", daemon=True).start()

    def tell(self, report: Report) -> None:
        """Put up what this machine has to say."""
        with self._lock:
            self._own = report
            self._look()

    @property
    def word(self) -> Word:
        """What was decided so far."""
        with self._lock:
            return self._word

    @property
    def silence(self) -> float:
        """Seconds without an answer."""
        return 0.0

    def look_for_another(self, address: str, port: int) -> None:
        """Where `address` is not this machine's: another machine 0 that answers there means that the number was given twice."""

        def look() -> None:
            while not self._closed.wait(BEAT_S) and not self.word.board.round:
                try:
                    answer = _exchange(address, port, {"who": self._own.launcher})
                except (OSError, ValueError):
                    continue
                if "host" in answer and answer["host"] != self._own.launcher:
                    with self._lock:
                        self._word = replace(self._word, refused=_twice(0, address))
                return

        if not is_own(address):
            threading.Thread(target=look, name="another-machine-0", daemon=True).start()

    def close(self) -> None:
        """Stop listening once the others know how it ended, or have fallen silent."""
        deadline = time.monotonic() + _FAREWELL_S
        while self.word.board.ending is not None and time.monotonic() < deadline and self._unaware():
            time.sleep(_TICK_S)
        self._closed.set()
        self._server.close()

    def _unaware(self) -> bool:
        with self._lock:
            now = time.monotonic()
            here = [each.report for each in self._heard.values() if now - each.at < 3 * BEAT_S]
            return any(each.launcher not in self._know_the_end and each.node != self._own.node for each in here)

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                pass
            except OSError:
                return  # closed
            else:
                threading.Thread(target=self._answer, args=(connection,), name="machine-0-answer", daemon=True).start()
            with self._lock:
                self._look()

    def _look(self) -> None:
        now = time.monotonic()
        stalled = now - self._looked
        self._looked = now
        if stalled > _STALL_S:
            self._heard = {node: replace(each, at=each.at + stalled) for node, each in self._heard.items()}
        self._heard[self._own.node] = Heard(report=self._own, at=now)
        self._word = replace(self._word, board=decide(self._word.board, self._heard, self._rules, now))

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(_ANSWER_S)
            try:
                message = _read_line(connection)
                reply = self._reply(message)
                connection.sendall(json.dumps(reply).encode() + b"\n")
            except (OSError, ValueError, KeyError, TypeError):
                return  # not a launcher, or one that went away
            if "report" in message and self.word.board.ending is not None:
                with self._lock:
                    self._know_the_end.add(str(message["report"]["launcher"]))

    def _reply(self, message: dict[str, Any]) -> dict[str, Any]:
        if "who" in message:
            return {"host": self._own.launcher}
        report = _report(message["report"])
        with self._lock:
            if message.get("leaves"):
                if report.node in self._heard and self._heard[report.node].report.launcher == report.launcher:
                    del self._heard[report.node]
                return {}
            refused = self._refusal(report)
            if refused is None:
                self._heard[report.node] = Heard(report=report, at=time.monotonic())
                self._look()
            return asdict(replace(self._word, refused=refused))

    def _refusal(self, report: Report) -> Told | None:
        if report.machines != self._own.machines:
            message = f"machine {report.node} was started for {report.machines} machines, machine 0 for {self._own.machines}"
            hint = f"--num-nodes {self._own.machines} on all machines"
            return Told.of(ConfigError(Problem(code="distributed.ranks-differ", message=message, where="distributed.num_nodes", hint=hint)))
        known = self._heard.get(report.node)
        if known is None or known.report.launcher == report.launcher:
            return None
        recent = time.monotonic() - known.at <= self._rules.silence and known.report.state != "done"
        return _twice(report.node, "machine 0") if recent or report.node == self._own.node else None


class Guest:
    """The end of every other machine."""

    def __init__(self, report: Report, *, address: str, port: int) -> None:
        self._named, self._report = (address, port), report
        self._place = self._named
        """Its number, once it has answered: names are not looked up over a cut cable."""
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), threading.Event()
        self._word: Word | None = None
        self._silence = 0.0
        self.last_trouble = ""
        threading.Thread(target=self._beat, name="to-machine-0", daemon=True).start()

    def tell(self, report: Report) -> None:
        """Send it at once, and again every second."""
        with self._lock:
            self._report = report
        self._wake.set()

    @property
    def word(self) -> Word | None:
        """The last answer; None before the first."""
        with self._lock:
            return self._word

    @property
    def silence(self) -> float:
        """Seconds without an answer."""
        with self._lock:
            return self._silence

    def close(self) -> None:
        """Tell machine 0 that this launcher leaves, if it can be told."""
        self._closed.set()
        self._wake.set()
        if self._report.state == "done":
            return
        try:
            _exchange(*self._place, {"report": asdict(self._report), "leaves": True})
        except (OSError, ValueError):
            return

    def _beat(self) -> None:
        tried = time.monotonic()
        while not self._closed.is_set():
            with self._lock:
                report = self._report
            try:
                if self._word is None:
                    self._place = (str(socket.getaddrinfo(*self._named, type=socket.SOCK_STREAM)[0][4][0]), self._named[1])
                word = _word(_exchange(*self._place, {"report": asdict(report)}))
            except (OSError, ValueError, KeyError, TypeError) as error:
                word, self.last_trouble = None, str(error) or type(error).__name__
            now = time.monotonic()
            with self._lock:
                self._silence = 0.0 if word is not None else self._silence + min(now - tried, BEAT_S + 2 * _ANSWER_S)
                self._word = word or self._word
            tried = now
            self._wake.wait(BEAT_S)
            self._wake.clear()


def new_launcher() -> str:
    """A name that no other launcher has."""
    return secrets.token_hex(8)


def _twice(node: int, place: str) -> Told:
    where = "where distributed.master_addr points" if node == 0 else f"known to {place}"
    message = f"another machine with the number {node} is there, {where}: each machine needs its own"
    hint = "--node-rank: 0 on the machine of --master-addr, then 1, 2, ..."
    return Told.of(ConfigError(Problem(code="distributed.node-rank-twice", message=message, where="distributed.node_rank", hint=hint)))


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # the system has IPv6, but switched off
                raise
    return socket.create_server(("", port))


def _exchange(address: str, port: int, message: dict[str, Any]) -> dict[str, Any]:
    """Send a line, read a line. OSError when nobody answers in time, ValueError when it is no launcher that does."""
    with socket.create_connection((address, port), timeout=_ANSWER_S) as connection:
        connection.settimeout(_ANSWER_S)
        connection.sendall(json.dumps(message).encode() + b"\n")
        return _read_line(connection)


def _read_line(connection: socket.socket) -> dict[str, Any]:
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(2**16)
        received += part
        if not part or len(received) > _LONGEST_LINE:
            raise ValueError("what answers there is no launcher of llamahome")
    content = json.loads(received)
    if not isinstance(content, dict):
        raise ValueError("what answers there is no launcher of llamahome")
    return content


def _told(content: dict[str, Any] | None) -> Told | None:
    return None if content is None else Told(content["kind"], tuple(content["problems"]))


def _report(content: dict[str, Any]) -> Report:
    fault = content["fault"]
    return Report(**{**content, "fault": fault and Fault(**{**fault, "error": _told(fault["error"])})})


def _word(content: dict[str, Any]) -> Word:
    board = content["board"]
    ending = board["ending"] and Ending(**{**board["ending"], "error": _told(board["ending"]["error"])})
    members = tuple(Member(**each) for each in board["members"])
    whole = Board(**{**board, "ending": ending, "members": members})
    return Word(board=whole, store_port=content["store_port"], refused=_told(content["refused"]))
