"""One of two processes that sum a tensor: `python -m llamahome.distributed.exchange_probe FILE BACKEND RANK`, for `llamahome doctor`.

They meet in FILE. Prints one JSON object: whether the sum is right, and the rate in bytes of the tensor a second.
"""

import json
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

_ELEMENTS = 4 * 2**20
"""float32: 16 MiB, as many as the gradients of LoRA on the starter."""
_REPEATS = 4


def main(meeting: str, backend: str, rank: int) -> None:
    """Join, exchange, and print the result."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=2)
    best, right = float("inf"), True
    for repeat in range(_REPEATS):
        values = torch.full((_ELEMENTS,), float(rank + 1 + repeat), device=device)
        started = time.perf_counter()
        dist.all_reduce(values)
        right &= bool((values == 3 + 2 * repeat).all().item())  # reads the device back, so the exchange is over
        best = min(best, time.perf_counter() - started)
    dist.destroy_process_group()
    sys.stdout.write(json.dumps({"right": right, "bytes_per_s": _ELEMENTS * 4 / best}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
