"""Where the launchers of one machine or of several meet, and what is told when they do not.

On one machine the meeting place is a file, so nothing listens beyond loopback. Several machines meet at distributed.master_addr,
where machine 0 listens; that much the user asks for by naming more than one machine.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamahome.config.schema import DistributedConfig, interval
from llamahome.errors import MachineError, Problem

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
        "timeout": int(interval(config.timeout).value),
    }


def require_meeting_place(config: DistributedConfig) -> None:
    """Machine 0: the port is free. The others: machine 0 answers within distributed.timeout. Torch would tell it in pages."""
    place = (config.master_addr, config.master_port)
    if config.node_rank == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", config.master_port))
                return
            except OSError as error:
                problem = Problem(
                    code="distributed.port-taken",
                    message=f"port {config.master_port} of this machine cannot be used: {error.strerror}",
                    where="distributed.master_port",
                    hint=f"--master-port {config.master_port + 1 if config.master_port < 65535 else 29500} on all machines",
                )
                raise MachineError(problem) from error
    deadline = time.monotonic() + interval(config.timeout).value
    while True:
        try:
            socket.create_connection(place, timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(_RETRY_S)
                continue
            raise _not_met(config, str(error)) from error


def _not_met(config: DistributedConfig, why: str) -> MachineError:
    return MachineError(
        Problem(
            code="distributed.machines-not-met",
            message=f"the machines did not meet at {config.master_addr}:{config.master_port} within {config.timeout}: {why}",
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
