"""Tasks of the worker processes of test_world.py and test_joining.py."""

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from llamahome.distributed.agreement import require_agreement
from llamahome.distributed.watchdog import Watchdog
from llamahome.distributed.world import World
from llamahome.errors import LlamaHomeError


def collectives(world: World, payload):
    total = torch.tensor([1.0 + world.rank, 10.0])
    world.sum_(total)
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(4))]
    frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    half = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    parameters[0].grad = torch.arange(6.0).view(2, 3).t().contiguous().t() * (world.rank + 1)
    if world.rank == 0:
        parameters[1].grad = torch.tensor(7.0)
    half.grad = torch.ones(3, dtype=torch.bfloat16)
    world.sum_gradients_(iter([*parameters, frozen, half]))
    listening = [each.laddr.ip for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    world.barrier()
    return {
        "place": [world.rank, world.size, world.local_rank, world.is_main, str(world.device)],
        "sum": total.tolist(),
        "any": [world.any(world.rank == world.size - 1), world.any(False), world.any(True)],
        "max": [world.max(float(world.rank)), world.max(-1.5 - world.rank), repr(world.max(float("nan") if world.rank else 1.0))],
        "object": world.broadcast_object({"run": "räven", "n": [1, None, 2.5]} if world.is_main else None),
        "empty": world.broadcast_object("" if world.is_main else 3),
        "gradients": [each.grad.tolist() for each in parameters],
        "frozen": frozen.grad is None,
        "half": half.grad.float().tolist(),
        "threads": torch.get_num_threads(),
        "beyond loopback": [ip for ip in listening if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")],
        "timeout": torch.distributed.group.WORLD._get_backend(world.device).options._timeout.total_seconds(),
        "loopback": os.environ.get("GLOO_SOCKET_IFNAME"),
    }


def lose_a_peer(world: World, payload):
    """Process 1 exits without an error; the others must get an error and not hang."""
    if world.rank == 1:
        os._exit(0)
    world.sum_(torch.ones(10))
    world.sum_(torch.ones(10))


def disagree(world: World, payload):
    """The processes have the same data but different learning rates."""
    require_agreement(world, {"data": "same"})
    try:
        require_agreement(world, {"data": "same", "training.learning_rate": str(world.rank)})
    except LlamaHomeError as error:
        return [problem.code for problem in error.problems]


def time_out(world: World, payload):
    """Process 1 is busy for longer than the timeout of process 0."""
    world.rank_status.enter("in training" if world.is_main else "while reading the data")
    if not world.is_main:
        time.sleep(8)
        return ""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=3))
    try:
        world.barrier()
    except LlamaHomeError as error:
        return error.problems[0].message


def one_hangs(world: World, payload):
    """Process 1 waits for data and process 0 for process 1; the problem that each of them shows."""
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / f"rank-{world.rank}.log"
        watchdog = Watchdog(world.rank_status, log, limit_s=0.5, tick_s=0.05, end=errors.append)
        with watchdog.watching():
            for _ in range(5):
                watchdog.enter("data")
                watchdog.enter("forward")
            watchdog.enter("data" if world.rank == 1 else "exchange")
            while not errors:
                time.sleep(0.02)
    (problem,) = errors[0].problems
    return {"message": problem.message.partition(": ")[2], "excerpt": problem.excerpt.partition("\n")[2]}


def one_reads_for_ever(world: World, payload):
    """Process 1 stands still while it reads, and process 0 waits for it; where the processes stand, if this one would have ended."""
    errors = []
    with Watchdog(world.rank_status, limit_s=0.5, tick_s=0.05, end=errors.append).watching("read"):
        while world.rank == 1 and not errors:
            time.sleep(0.5)  # rarely awake, because a process that waits for a busy processor does not stand still
        world.barrier()
    return [error.problems[0].message.partition(": ")[2] for error in errors]
