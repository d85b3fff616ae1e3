"""Start the processes of this machine, pass signals on to them, and end as the first of them that failed.

torch's elastic agent starts and watches them, each running `python -m llamahome` with the words that were typed. On one machine
nothing listens beyond loopback: they meet over a file. Several machines meet at distributed.master_addr. Whatever ends this
process, none of the workers stays behind: they follow it (failures.follow_launcher) even when it is killed.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from llamahome.config.schema import DistributedConfig
from llamahome.distributed import failures
from llamahome.distributed.outcome import outcome
from llamahome.distributed.place import find_place
from llamahome.errors import ConfigError, LlamaHomeError, Problem

if TYPE_CHECKING:
    from llamahome.distributed.agent import Agent, Orders
    from llamahome.distributed.rendezvous import Ended

MODULE = ("-m", "llamahome")
_FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}
"""What comes and what the workers get: a closed terminal (SIGHUP) asks for an orderly stop like SIGTERM."""
_OF_OTHER_AGENTS = ("TORCHELASTIC_", "TORCH_ELASTIC_")
"""Variables by which torch's agent would obey a launcher that is gone."""
_PATIENCE = 2
"""Signals that are passed on as they are; one more kills."""


def needs_launch(config: DistributedConfig, environment: Mapping[str, str], *, gpus: int | None = None) -> int:
    """How many processes to start on this machine; 0 when this process does the work itself or was started as one of several.

    `gpus` is counted when None. Raises ConfigError: sizes that do not fit together.
    """
    if find_place(environment).joins:
        return 0
    if gpus is None:
        import torch  # late: the question is asked where nothing else needs torch yet

        gpus = torch.cuda.device_count()
    size = max(1, gpus) * config.most_nodes if config.world_size == "auto" else config.world_size
    problems = []
    if config.node_rank >= config.most_nodes:
        problems.append(
            Problem(
                code="distributed.node-rank-too-large",
                message=f"this machine is number {config.node_rank}, but there are {config.most_nodes} (numbered from 0)",
                where="distributed.node_rank",
                hint=f"--node-rank 0 to {config.most_nodes - 1}, or --num-nodes {config.node_rank + 1}",
            )
        )
    if size % config.most_nodes:
        below = size // config.most_nodes * config.most_nodes
        fits = " or ".join(str(each) for each in (below, below + config.most_nodes) if each)
        problems.append(
            Problem(
                code="distributed.world-size-not-divisible",
                message=f"{size} processes cannot be shared out evenly over {config.most_nodes} machines",
                where="distributed.world_size",
                hint=f"--world-size {fits}",
            )
        )
    elif gpus and size // config.most_nodes > gpus:
        problems.append(
            Problem(
                code="distributed.more-processes-than-gpus",
                message=f"{size // config.most_nodes} processes on this machine, which has {gpus} GPUs",
                where="distributed.world_size",
                hint=f"--world-size {gpus * config.most_nodes}",
            )
        )
    if problems:
        raise ConfigError(problems)
    return 0 if size == 1 else size // config.most_nodes


def launch(
    command_argv: Sequence[str], config: DistributedConfig, *, entry: Sequence[str] = MODULE, say: Callable[[str], None] = lambda _: None
) -> int:
    """Run `python -m llamahome <command_argv>` as all processes of this machine; the exit status when it was told already.

    A process that dies is no end while distributed.max_restarts allows: all start again and go on with the run; `say` is told.
    Raises what the first failing process raised (its kind, problems and exit status), MachineError distributed.process-killed
    when one was killed, LeftAtOnce when it was told to stop before anything could be saved.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

    from llamahome.distributed.agent import ENDLESS, Agent, Alone, Orders
    from llamahome.distributed.rendezvous import Rounds

    count = needs_launch(config, {})
    with tempfile.TemporaryDirectory(prefix="llamahome-launch-") as name, ExitStack() as stack:
        folder = Path(name)
        orders = Orders(folder=folder, max_restarts=config.max_restarts, spoken_by=0 if config.node_rank == 0 else -1, asked=[], say=say)
        stack.enter_context(_prepared(folder))
        rendezvous = Rounds(config, count, say=say) if config.most_nodes > 1 else Alone()
        stack.callback(rendezvous.shutdown)
        spec = WorkerSpec(
            role="llamahome",
            local_world_size=count,
            entrypoint=sys.executable,
            args=tuple(word.replace("$", "$$") for word in (*entry, *command_argv)),  # the agent fills in ${local_rank}
            rdzv_handler=rendezvous,
            max_restarts=ENDLESS,
            monitor_interval=0.1,
            local_addr="127.0.0.1" if config.most_nodes == 1 else None,
        )
        quiet = {local: Std.ALL for local in range(count) if local != orders.spoken_by}
        agent = Agent(spec, DefaultLogsSpecs(log_dir=str(folder / "output"), redirects=quiet), orders)
        return _run(agent, orders, config)


def _run(agent: "Agent", orders: "Orders", config: DistributedConfig) -> int:
    from llamahome.distributed.agent import GroupEnded
    from llamahome.distributed.rendezvous import Ended

    statuses: dict[int, int] = {}
    with _forwarding(agent, orders.asked):
        try:
            agent.run()
        except GroupEnded as ended:
            statuses = ended.statuses
        except Ended as ended:
            if not agent.statuses:
                raise _elsewhere(ended, config.node_rank) from None
            statuses = agent.statuses
        except LlamaHomeError:  # machine 0 is out of reach
            if not agent.statuses:
                raise
            statuses = agent.statuses  # what happened here was told by nobody yet
    return outcome(orders.folder, statuses, spoken_by=orders.spoken_by, asked=orders.asked)


def _elsewhere(ended: "Ended", node: int) -> LlamaHomeError:
    """What ended all machines, with the number of the one where it happened."""
    error = ended.told.error()
    if ended.node in (None, node):
        return error
    return type(error)([replace(problem, message=f"on machine {ended.node}: {problem.message}") for problem in error.problems])


@contextmanager
def _prepared(folder: Path) -> Iterator[None]:
    """The environment that the workers inherit, and the agent's own log kept off the screen; both as before afterwards."""
    settings = {
        failures.LAUNCH_FOLDER: str(folder),
        failures.LAUNCHER_PID: str(os.getpid()),
        failures.BEGUN: "",
        failures.ROUND: "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or the agent opens a port on all interfaces
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "",  # none: _forwarding does it
    }
    interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # the agent chooses them where the user did not
    leftovers = [name for name in os.environ if name.startswith(_OF_OTHER_AGENTS)]
    before = {name: os.environ.get(name) for name in (*settings, *interfaces, *leftovers)}
    for name in leftovers:
        del os.environ[name]
    chatter = logging.getLogger("torch.distributed.elastic")
    propagated, chatter.propagate = chatter.propagate, False
    silence = logging.NullHandler()
    chatter.addHandler(silence)
    os.environ.update(settings)
    try:
        yield
    finally:
        chatter.removeHandler(silence)
        chatter.propagate = propagated
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _forwarding(agent: "Agent", asked: list[int]) -> Iterator[None]:
    """Pass each signal on to every worker once (they are out of the terminal's reach) and note it in `asked`."""

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        workers = [worker.id for worker in agent.get_worker_group().workers if isinstance(worker.id, int)]
        if not workers:
            raise KeyboardInterrupt
        for process in workers:
            try:
                os.killpg(process, _FORWARDED[signal.Signals(number)] if len(asked) <= _PATIENCE else signal.SIGKILL)
            except ProcessLookupError:
                continue

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
