"""Lets the machines of a run meet before the run does: who is missing, why one is not reached, and how fast the links are.

Machine 0 listens at distributed.master_addr, as in a run, so a firewall or a wrong name shows here. Standard library only.
"""

import errno
import shlex
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from llamahome import __version__
from llamahome.doctor.checks import Check, failed, passed, warned
from llamahome.doctor.links import Line, Link, answer, introduce, measure, meet
from llamahome.units import show_bytes, show_seconds

_RETRY_S, _LATE_S = 0.5, 0.2
_SLOW_LINK, _LATE = 100e6, 5e-3
"""Bytes a second, and seconds. 1 Gb/s Ethernet reaches 117 MB/s; an exchange has one round trip for each machine."""
_LOOPBACK = ("127.", "::1")


@dataclass(frozen=True)
class Place:
    """Where the machines meet, and which one this is."""

    address: str
    port: int
    rank: int
    least: int
    """Machines that a run needs."""
    nodes: int
    """Machines that it takes at most."""
    seconds: float
    """How long to wait for the others."""

    @property
    def shown(self) -> str:
        """address:port."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def command(self, rank: int, *, address: str | None = None, port: int | None = None) -> str:
        """What is typed on machine `rank`."""
        words = ["llamahome", "doctor", "--num-nodes", str(self.nodes), "--node-rank", str(rank), "--master-addr", address or self.address]
        if (port or self.port) != 29500:
            words += ["--master-port", str(port or self.port)]
        return shlex.join(words)


@dataclass(frozen=True)
class Meeting:
    """How the meeting went, as machine 0 saw it, or why there was none."""

    trouble: str | None = None
    """unresolved, loopback, not-mine, port-taken, refused, silent, unreachable, left, twice or other-program."""
    reason: str = ""
    links: tuple[Link, ...] = ()
    strangers: int = 0
    """Connections of other programs."""
    own_address: str | None = None
    """Of this machine, as others see it."""
    twice: tuple[int, ...] = ()
    """Numbers that two machines gave."""
    broken: dict[str, str] = field(default_factory=dict)
    """Number of a machine -> why its link broke off while it was measured."""


def hold_meeting(place: Place) -> Meeting:
    """Meet the other machines, and measure. Ends within `place.seconds` and the time of the measurements."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return Meeting("unresolved", error.strerror or str(error))
    resolved = str(target[0])
    named = place.address != "localhost" and not place.address.startswith(_LOOPBACK)
    if named and resolved.startswith(_LOOPBACK):
        return Meeting("loopback", resolved, own_address=_own_address())
    if place.rank == 0:
        return _host(place, family, kind, target)
    return _visit(place)


def _host(place: Place, family: int, kind: int, target: tuple[object, ...]) -> Meeting:
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(target)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return Meeting("port-taken", error.strerror or "")
            return Meeting("not-mine", error.strerror or "", own_address=_own_address())
        listener.listen(place.nodes + 8)
        lines: dict[int, tuple[Line, dict[str, object]]] = {}
        try:
            strangers, twice = _gather(listener, place, lines)
            meeting = _measure_all(lines, strangers, twice)
            return replace(meeting, twice=(*meeting.twice, *_turn_away(listener)))
        finally:
            for line, _ in lines.values():
                line.close()


def _gather(listener: socket.socket, place: Place, lines: dict[int, tuple[Line, dict[str, object]]]) -> tuple[int, list[int]]:
    """Fill `lines` with the machines that arrive in time; returns the number of strangers, and the numbers that came twice."""
    strangers, twice, deadline = 0, [], time.monotonic() + place.seconds
    while len(lines) < place.nodes - 1 and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        line = Line(connection)
        line.socket.settimeout(5.0)
        try:
            hello = dict(meet(line))
            line.socket.settimeout(20.0)
        except OSError:
            strangers += 1
            line.close()
            continue
        rank = int(str(hello["rank"]))
        if rank in lines or not 0 < rank < place.nodes:
            twice.append(rank)
            _tell(line, do="end", trouble="twice", reason=str(rank))
            line.close()
        else:
            lines[rank] = line, hello
    return strangers, twice


def _turn_away(listener: socket.socket) -> list[int]:
    """Answer machines that came after all had arrived; returns the numbers that they gave."""
    late: list[int] = []
    listener.settimeout(_LATE_S)
    while True:
        try:
            line = Line(listener.accept()[0])
        except OSError:
            return late
        line.socket.settimeout(_LATE_S)
        try:
            late.append(int(meet(line)["rank"]))
            line.say(do="end", trouble="twice", reason=str(late[-1]))
        except OSError:
            continue  # another program
        finally:
            line.close()


def _measure_all(lines: dict[int, tuple[Line, dict[str, object]]], strangers: int, twice: list[int]) -> Meeting:
    """Measure one link after the other, and tell everybody all results."""
    links, broken = [], {}
    for rank, (line, hello) in sorted(lines.items()):
        for other, (waiting, _) in lines.items():
            if other != rank:
                _tell(waiting, do="wait")
        try:
            links.append(measure(line, hello))
        except OSError as error:
            broken[str(rank)] = str(error) or type(error).__name__
    meeting = Meeting(links=tuple(links), strangers=strangers, twice=tuple(twice), broken=broken)
    for line, _ in lines.values():
        _tell(line, do="end", meeting=asdict(meeting))
    return meeting


def _tell(line: Line, **message: object) -> None:
    try:
        line.say(**message)
    except OSError:
        return  # it has left, which its own report says


def _visit(place: Place) -> Meeting:
    """Connect to machine 0 and answer it; it may start later."""
    deadline, last = time.monotonic() + place.seconds, OSError("no time")
    connection = None
    while connection is None:
        try:
            connection = socket.create_connection((place.address, place.port), timeout=max(0.2, deadline - time.monotonic()))
        except OSError as error:
            last = error
            if time.monotonic() + _RETRY_S >= deadline:
                return Meeting(_kind_of(last), last.strerror or str(last))
            time.sleep(_RETRY_S)
    line, own = Line(connection), connection.getsockname()
    try:
        with socket.socket(connection.family, socket.SOCK_STREAM) as open_port:
            open_port.bind((own[0], 0))
            open_port.listen(1)
            introduce(line, rank=place.rank, nodes=str(place.nodes), version=__version__, port=int(open_port.getsockname()[1]))
            line.socket.settimeout(place.seconds + 20.0 * place.nodes)  # machine 0 waits for the others first
            ending = answer(line)
    except OSError as error:
        return Meeting("left", str(error) or type(error).__name__)
    finally:
        line.close()
    if "meeting" not in ending:
        return Meeting(str(ending.get("trouble", "other-program")), str(ending.get("reason", "")))
    told = ending["meeting"]
    links = tuple(Link(**each) for each in told["links"])
    return Meeting(**{**told, "links": links, "twice": tuple(told["twice"])})


def _kind_of(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "silent"
    return "unreachable"


def _own_address() -> str | None:
    """The address from which packets to other networks leave; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737)
        except OSError:
            return None
        return str(probe.getsockname()[0])


def node_checks(place: Place, meeting: Meeting) -> Iterator[Check]:
    """Who is missing, or why the machines did not meet; then one check for each link."""
    if meeting.trouble is not None:
        yield _no_meeting(place, meeting)
        return
    here = {0} | {link.rank for link in meeting.links} | {int(rank) for rank in meeting.broken}
    missing = [rank for rank in range(place.nodes) if rank not in here]
    strangers = f"; {meeting.strangers} connections of other programs were ignored" if meeting.strangers else ""
    if meeting.twice:
        numbers = ", ".join(str(rank) for rank in sorted(set(meeting.twice)))
        yield failed("nodes", f"more than one machine calls itself machine {numbers}; each needs its own --node-rank{strangers}")
    elif missing:
        names = ", ".join(str(rank) for rank in missing)
        text = f"{len(here)} of {place.nodes} machines met at {place.shown} within {show_seconds(place.seconds)}; missing: machine {names}"
        make = failed if len(here) < place.least else warned
        yield make("nodes", text + strangers, place.command(missing[0]))
    else:
        yield passed("nodes", f"all {place.nodes} machines met at {place.shown}{strangers}")
    for link in meeting.links:
        if place.rank in (0, link.rank):
            yield link_check(link)
    for rank, reason in meeting.broken.items():
        yield failed(f"link-{rank}", f"the link of machine 0 and machine {rank} broke off: {reason}")


def link_check(link: Link) -> Check:
    """Whether one link carries a training."""
    rates = f"{show_bytes(link.sent)}/s there, {show_bytes(link.received)}/s back, {link.latency_s * 1e3:.2f} ms there and back"
    name, detail = f"link-{link.rank}", f"machine 0 and machine {link.rank} ({link.host}): {rates}"
    if link.version != __version__:
        return failed(name, f"{detail}; it has llamahome {link.version}, and here is {__version__}")
    if not link.open_ports:
        text = f"{detail}; but machine 0 does not reach another port there: torch's processes need all ports between the machines"
        return failed(name, text)
    if min(link.sent, link.received) < _SLOW_LINK:
        return warned(
            name, f"{detail}; gradients take long over it, so prefer LoRA and large batches", "export LLAMAHOME_TRAINING__METHOD=lora"
        )
    if link.latency_s > _LATE:
        return warned(name, f"{detail}; every step waits for it several times")
    return passed(name, detail)


def _no_meeting(place: Place, meeting: Meeting) -> Check:
    """Why the machines did not meet."""
    name, reason, waited = "nodes", meeting.reason, show_seconds(place.seconds)
    own = meeting.own_address
    match meeting.trouble:
        case "unresolved":
            return failed(name, f"the name {place.address!r} cannot be resolved on this machine: {reason}")
        case "loopback":
            text = f"{place.address!r} is {reason} on this machine (see /etc/hosts), which no other machine can reach"
            return failed(name, text, place.command(0, address=own) if own and place.rank == 0 else None)
        case "not-mine":
            text = f"machine 0 does not have the address {place.address}: {reason}"
            return failed(name, text, place.command(0, address=own) if own else None)
        case "port-taken":
            free = place.port + 1 if place.port < 65535 else 29500
            return failed(name, f"port {place.port} of this machine is in use by another program", place.command(0, port=free))
        case "refused":
            text = f"machine 0 at {place.shown} refused for {waited}: doctor does not run there, or a firewall rejects the port"
            return failed(name, text, place.command(0))
        case "silent":
            text = f"no answer from {place.shown} within {waited}: a firewall drops the packets, or it is the address of another network"
            return failed(name, text)
        case "twice":
            return failed(name, f"another machine calls itself machine {reason}, or there are only {place.nodes}")
        case "left":
            return failed(name, f"machine 0 at {place.shown} ended the connection: {reason}; another program may listen there")
    return failed(name, f"machine 0 at {place.shown} is not reached: {reason}")
