"""Where the launchers of one machine or of several meet, and what is told when they do not.

On one machine the meeting place is a file, so nothing listens beyond loopback. Several machines meet at distributed.master_addr,
where machine 0 listens; that much the user asks for by naming more than one machine.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamahome.config.schema import DistributedConfig, interval
from llamahome.distributed.place import Place
from llamahome.errors import MachineError, Problem

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_RETRY_S = 0.5


def parameters(config: DistributedConfig, folder: Path) -> dict[str, Any]:
    """What torch's RendezvousParameters are made from."""
    if config.num_nodes == 1:
        return {
            "backend": "c10d",
            "endpoint": str(folder / "agent"),
            "store_type": "file",
            "run_id": "llamahome",
            "min_nodes": 1,
            "max_nodes": 1,
            "local_addr": "127.0.0.1",
        }
    return {
        "backend": "static",  # keeps machine 0 the one with process 0, which c10d's rendezvous does not promise
        "endpoint": f"{config.master_addr}:{config.master_port}",
        "run_id": "llamahome",
        "min_nodes": config.num_nodes,
        "max_nodes": config.num_nodes,
        "rank": config.node_rank,
        "timeout": int(interval(config.join_timeout).value),
    }


def require_meeting_place(config: DistributedConfig) -> None:
    """Machine 0: the port is free. The others: machine 0 answers within distributed.join_timeout. Torch would tell it in pages."""
    place = (config.master_addr, config.master_port)
    if config.node_rank == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", config.master_port))
                return
            except OSError as error:
                raise MachineError(_port_taken(config.master_port, str(error.strerror))) from error
    _reach(*place, interval(config.join_timeout).value, config)


def _port_taken(port: int, why: str) -> Problem:
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
            raise _not_met(config, str(error)) from error


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
        return TCPStore(address, port, None, keeps, timeout=patience, wait_for_workers=False)
    except RuntimeError as error:
        if keeps and "EADDRINUSE" in str(error):
            raise MachineError(_port_taken(port, "address already in use")) from error
        raise _not_met(config, str(error).splitlines()[0][:200]) from error


def _not_met(config: DistributedConfig, why: str) -> MachineError:
    return MachineError(
        Problem(
            code="distributed.machines-not-met",
            message=f"the machines did not meet at {config.master_addr}:{config.master_port} within {config.join_timeout}: {why}",
            where="distributed.master_addr",
            hint=f"llamahome train-distributed on all {config.num_nodes} machines, each with the --master-addr of machine 0",
        )
    )


@contextmanager
def reaching(config: DistributedConfig) -> Iterator[None]:
    """Turn what torch raises when machines do not meet into MachineError distributed.machines-not-met."""
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        yield
    except (DistError, RendezvousError, TimeoutError) as error:
        raise _not_met(config, str(error).splitlines()[0][:200]) from error
