"""Which network interface leads to machine 0: gloo and NCCL take the one of the host's name, which is often loopback or a wrong one."""

import socket

import psutil


def route_to(address: str) -> str | None:
    """The name of the interface that carries `address`, or else of the one that a packet to it would leave by; None when unknown."""
    try:
        found = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, _, _, target in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(target)  # sends nothing; the system chooses the way
            except OSError:
                continue
            here = str(probe.getsockname()[0])
        if name := _carrier(str(target[0])) or _carrier(here):
            return name
    return None


def is_own(address: str) -> bool:
    """Whether an interface of this machine carries `address`."""
    try:
        return any(_carrier(str(found[4][0])) for found in socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM))
    except OSError:
        return False


def _carrier(address: str) -> str | None:
    plain = address.partition("%")[0]
    names = (
        str(name)
        for name, each in psutil.net_if_addrs().items()
        if any(one.address.partition("%")[0] == plain for one in each if one.family in (socket.AF_INET, socket.AF_INET6))
    )
    return next(names, None)
