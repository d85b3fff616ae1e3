"""How the processes of a run find each other: the network interface, the store in which they meet, and the process group.

On one machine they meet in a file, so nothing listens beyond loopback. The processes of several machines meet at distributed.master_addr.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from llamahome.config.schema import DistributedConfig, interval
from llamahome.distributed import failures
from llamahome.distributed.rank_info import RankInfo
from llamahome.distributed.rank_status import missing_ranks, processes
from llamahome.errors import MachineError, Problem

if TYPE_CHECKING:
    from llamahome.distributed.world import World

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_RETRY_S = 0.5


def join_group(world: "World", info: RankInfo, config: DistributedConfig, backend: str, *, reading_s: float = 0.0) -> None:
    """Meet the other processes and open the process group; they may come `reading_s` seconds later than the limit. Called by all processes.

    Raises MachineError distributed.ranks-missing, or what `open_store` raises.
    """
    one_machine, folder = info.size == info.local_size, failures.launch_folder()
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if one_machine and loopback:
        for variable in INTERFACES:
            os.environ.setdefault(variable, loopback)
    attempt = os.environ.get(failures.ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if one_machine and folder:
        store: Store = FileStore(f"{folder}/meeting-{attempt}", world.size)
        limit = config.timeout
    else:
        store = PrefixStore(f"llamahome-{attempt}", open_store(info, config, reading_s=reading_s))
        limit = config.join_timeout
    timeout = timedelta(seconds=interval(limit).value + reading_s)
    missing = missing_ranks(store, rank=world.rank, size=world.size, timeout=timeout)
    if missing:
        message = f"{processes(missing)} of {world.size} did not arrive within {_shown(limit, reading_s)}"
        hint = f"unset RANK WORLD_SIZE if nobody started {world.size} processes; if they are slow: --set distributed.join_timeout='10 min'"
        raise MachineError(Problem(code="distributed.ranks-missing", message=message, where=info.starter, hint=hint))
    world.rank_status.open(PrefixStore("status", store), rank=world.rank, size=world.size)
    timeout = timedelta(seconds=interval(config.timeout).value)
    with world.guarded():
        dist.init_process_group(backend, store=PrefixStore("group", store), rank=world.rank, world_size=world.size, timeout=timeout)


def open_store(info: RankInfo, config: DistributedConfig, *, reading_s: float = 0.0) -> TCPStore:
    """Open the store at the address that the starter or the settings name; process 0 hosts it, unless the launcher does.

    Raises MachineError distributed.no-meeting-place, distributed.port-taken or distributed.machines-not-met.
    """
    address, port = info.address or config.master_addr, info.port or config.master_port
    if info.address is None and address.startswith("127."):
        message = f"{info.starter} does not say where process 0 is, and distributed.master_addr is an address of this machine only"
        hint = "--master-addr ADDRESS of the machine of process 0"
        raise MachineError(Problem(code="distributed.no-meeting-place", message=message, where="distributed.master_addr", hint=hint))
    is_host = info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=interval(config.join_timeout).value + reading_s)
    try:
        if not is_host:
            _wait_for_listener(address, port, timeout.total_seconds())
        with quiet_stderr():
            return TCPStore(address, port, None, is_host, timeout=timeout, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        if is_host and "EADDRINUSE" in str(error):
            raise MachineError(port_taken(port, "address already in use")) from error
        if info.starter == "llamahome":
            raise not_met(config, str(error).splitlines()[0][:200]) from error
        # the variables that name the address may be left over from another program
        message = (
            f"process {info.rank} of {info.size} found no process 0 at {address}:{port} within {_shown(config.join_timeout, reading_s)}"
        )
        hint = f"unset RANK WORLD_SIZE if nobody started {info.size} processes, or start process 0"
        raise MachineError(Problem(code="distributed.machines-not-met", message=message, where=info.starter, hint=hint)) from error


def _shown(limit: str, reading_s: float) -> str:
    return f"{limit} and {reading_s:.0f} s to read the checkpoint" if reading_s >= 1 else limit


def _wait_for_listener(address: str, port: int, timeout: float) -> None:
    """Return as soon as a program listens there; OSError after `timeout` seconds. torch's own client waits too, but blocks Ctrl-C."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_S)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard what torch's C++ code writes to stderr while it opens a store; its errors are raised anyway."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def not_met(config: DistributedConfig, reason: str = "") -> MachineError:
    """The error if machines or processes did not arrive at the meeting place in time."""
    place = f"{config.master_addr}:{config.master_port}"
    return MachineError(
        Problem(
            code="distributed.machines-not-met",
            message=f"the machines did not meet at {place} within {config.join_timeout}{reason and f': {reason}'}",
            where="distributed.master_addr",
            hint=f"llamahome train-distributed on all machines ({config.num_nodes}), each with the --master-addr of machine 0",
        )
    )


def port_taken(port: int, reason: str) -> Problem:
    """The problem if this process cannot listen on `port`."""
    return Problem(
        code="distributed.port-taken",
        message=f"port {port} of this machine cannot be used: {reason}; another run, or a second machine 0?",
        where="distributed.master_port",
        hint=f"--master-port {port + 1 if port < 65535 else 29500} on all machines",
    )


def interface_to(address: str) -> str | None:
    """The network interface that has `address`, or else the one that packets to `address` leave by; None if there is none.

    gloo and NCCL would take the interface of the host's name, which is often loopback or the wrong network.
    """
    for family, kind, _, _, target in _resolve(address):
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(target)  # UDP: sends nothing, but the system selects the route
            except OSError:
                continue
            own_address = str(probe.getsockname()[0])
        if name := _interface_of(str(target[0])) or _interface_of(own_address):
            return name
    return None


def is_own_address(address: str) -> bool:
    """Whether an interface of this machine has `address`."""
    return any(_interface_of(str(target[0])) for *_, target in _resolve(address))


def _resolve(address: str) -> list[tuple[int, int, int, str, tuple[str | int, ...]]]:
    try:
        return list(socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM))  # type: ignore[arg-type]
    except OSError:
        return []


def _interface_of(address: str) -> str | None:
    plain = address.partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == plain for each in addresses if each.family in (socket.AF_INET, socket.AF_INET6)):
            return str(name)
    return None
