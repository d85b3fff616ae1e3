"""Where the processes of several machines meet, and what is told when machines or processes do not.

On one machine the meeting place is a file, so nothing listens beyond loopback. Several machines meet at distributed.master_addr,
where machine 0 listens; that much the user asks for by naming more than one machine.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from llamahome.config.schema import DistributedConfig, interval
from llamahome.distributed.place import Place
from llamahome.errors import MachineError, Problem

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_RETRY_S = 0.5


def port_taken(port: int, why: str) -> Problem:
    """Somebody else listens there."""
    return Problem(
        code="distributed.port-taken",
        message=f"port {port} of this machine cannot be used: {why}; another run, or a second machine 0?",
        where="distributed.master_port",
        hint=f"--master-port {port + 1 if port < 65535 else 29500} on all machines",
    )


def _reach(address: str, port: int, patience: float, config: DistributedConfig) -> None:
    """Return when somebody listens there; MachineError distributed.machines-not-met after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(_RETRY_S)
                continue
            raise not_met(config, str(error)) from error


def open_store(place: Place, config: DistributedConfig) -> "TCPStore":
    """The store of processes that another program started, at the address that it or the settings name; process 0 keeps it.

    MachineError distributed.no-meeting-place, distributed.port-taken or distributed.machines-not-met.
    """
    from torch._C._distributed_c10d import TCPStore

    address, port = place.address or config.master_addr, place.port or config.master_port
    if place.address is None and address.startswith("127."):
        message = f"{place.starter} does not say where process 0 is, and distributed.master_addr is this machine alone"
        hint = "--master-addr ADDRESS of the machine of process 0"
        raise MachineError(Problem(code="distributed.no-meeting-place", message=message, where="distributed.master_addr", hint=hint))
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = timedelta(seconds=interval(config.join_timeout).value)
    if not keeps:
        _reach(address, port, patience.total_seconds(), config)
    try:
        with without_chatter():
            return TCPStore(address, port, None, keeps, timeout=patience, wait_for_workers=False)
    except RuntimeError as error:
        if keeps and "EADDRINUSE" in str(error):
            raise MachineError(port_taken(port, "address already in use")) from error
        raise not_met(config, str(error).splitlines()[0][:200]) from error


@contextmanager
def without_chatter() -> Iterator[None]:
    """Around the making of a store: torch's C++ writes to stderr when an address has no name. Its errors are raised, not written."""
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)


def not_met(config: DistributedConfig, why: str = "") -> MachineError:
    """Some of the machines, or the processes, did not come to the meeting place in time."""
    place = f"{config.master_addr}:{config.master_port}"
    return MachineError(
        Problem(
            code="distributed.machines-not-met",
            message=f"the machines did not meet at {place} within {config.join_timeout}{why and f': {why}'}",
            where="distributed.master_addr",
            hint=f"llamahome train-distributed on all machines ({config.num_nodes}), each with the --master-addr of machine 0",
        )
    )
