"""Start the processes of this machine, forward signals to them, and raise the error of the first process that failed.

torch's elastic agent starts and watches the processes; each one runs `python -m llamahome` with the words that were typed. On one machine
nothing listens beyond loopback, because the processes meet in a file. Several machines meet at distributed.master_addr. However the
launcher ends, even by SIGKILL, no worker stays behind (failures.watch_launcher).
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
from llamahome.distributed.holder import take_over
from llamahome.distributed.rank_info import find_rank_info
from llamahome.errors import ConfigError, LlamaHomeError, MachineError, Problem

if TYPE_CHECKING:
    from llamahome.distributed.agent import Agent, LaunchSettings
    from llamahome.distributed.rendezvous import Ended, MembershipRendezvous

MODULE = ("-m", "llamahome")
_FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}
"""Signal received -> signal sent to the workers. A closed terminal (SIGHUP) asks for an orderly stop like SIGTERM."""
_TORCH_AGENT_PREFIXES = ("TORCHELASTIC_", "TORCH_ELASTIC_")
"""Variables of an outer torch agent; if one is left over, the agent here would follow it."""
_FORWARDED_SIGNALS = 2
"""So many signals are forwarded; the next one kills the workers."""


def needs_launch(config: DistributedConfig, environment: Mapping[str, str], *, gpus: int | None = None) -> int:
    """The number of processes to start on this machine; 0 if this process does the work itself or was started as one of several.

    If `gpus` is None, the GPUs are counted. Raises ConfigError if the sizes do not fit together.
    """
    if find_rank_info(environment).joins:
        return 0
    if gpus is None:
        import torch  # late, because callers on the command line need torch for nothing else

        gpus = torch.cuda.device_count()
    nodes = config.most_nodes
    size = max(1, gpus) * nodes if config.world_size == "auto" else config.world_size
    local_size, rest = divmod(size, nodes)
    problems = []
    if config.node_rank >= nodes:
        problems.append(
            Problem(
                code="distributed.node-rank-too-large",
                message=f"the node rank of this machine is {config.node_rank}, but there are {nodes} machines (numbered from 0)",
                where="distributed.node_rank",
                hint=f"--node-rank 0 to {nodes - 1}, or --num-nodes {config.node_rank + 1}",
            )
        )
    if rest:
        fitting = " or ".join(str(each) for each in (size - rest, size - rest + nodes) if each)
        problems.append(
            Problem(
                code="distributed.world-size-not-divisible",
                message=f"{size} processes cannot be divided evenly among {nodes} machines",
                where="distributed.world_size",
                hint=f"--world-size {fitting}",
            )
        )
    elif gpus and local_size > gpus:
        problems.append(
            Problem(
                code="distributed.more-processes-than-gpus",
                message=f"{local_size} processes on this machine, which has {gpus} GPUs",
                where="distributed.world_size",
                hint=f"--world-size {gpus * nodes}",
            )
        )
    if problems:
        raise ConfigError(problems)
    return 0 if size == 1 else local_size


def launch(
    command_argv: Sequence[str], config: DistributedConfig, *, entry: Sequence[str] = MODULE, say: Callable[[str], None] = lambda _: None
) -> int:
    """Run `python -m llamahome <command_argv>` in all processes of this machine; returns the exit status if the error was already shown.

    A run of one process gets one process that is watched. If a process dies, all start again and resume the run, at most
    distributed.max_restarts times; `say` gets one line for each restart.
    Raises the error of the first process that failed, MachineError distributed.process-killed if one was killed, LeftAtOnce if a signal
    stopped them before anything was saved.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

    from llamahome.distributed.agent import UNLIMITED, Agent, LaunchSettings
    from llamahome.distributed.rendezvous import CONTACT_LOST, MembershipRendezvous, SingleNodeRendezvous

    count = needs_launch(config, {}) or 1
    with tempfile.TemporaryDirectory(prefix="llamahome-launch-") as name, ExitStack() as stack:
        folder, reporting_rank = Path(name), 0 if config.node_rank == 0 else -1
        settings = LaunchSettings(folder=folder, max_restarts=config.max_restarts, reporting_rank=reporting_rank, say=say)
        stack.enter_context(_launch_environment(folder))

        def agent_of(rendezvous: SingleNodeRendezvous, settings: LaunchSettings) -> Agent:
            spec = WorkerSpec(
                role="llamahome",
                local_world_size=count,
                entrypoint=sys.executable,
                args=tuple(word.replace("$", "$$") for word in (*entry, *command_argv)),  # the agent substitutes ${local_rank}
                rdzv_handler=rendezvous,
                max_restarts=UNLIMITED,
                monitor_interval=0.1,
                local_addr=None if isinstance(rendezvous, MembershipRendezvous) else "127.0.0.1",
            )
            to_files = {local_rank: Std.ALL for local_rank in range(count) if local_rank != settings.reporting_rank}
            return Agent(spec, DefaultLogsSpecs(log_dir=str(folder / "output"), redirects=to_files), settings)

        if config.most_nodes == 1:
            return _run(agent_of(SingleNodeRendezvous(), settings), settings, config)
        rendezvous = MembershipRendezvous(config, count, say=say)
        stack.callback(rendezvous.shutdown)
        agent = agent_of(rendezvous, settings)
        try:
            return _run(agent, settings, config)
        except MachineError as error:
            alone = _settings_alone(agent, rendezvous, settings, config) if error.problems[0].code == CONTACT_LOST else None
            if alone is None:
                raise
        return _run(agent_of(SingleNodeRendezvous(), alone), alone, config)


def _settings_alone(
    agent: "Agent", rendezvous: "MembershipRendezvous", settings: "LaunchSettings", config: DistributedConfig
) -> "LaunchSettings | None":
    """How this machine goes on alone after it has lost machine 0; None if it may not, or if another machine holds the run."""
    from llamahome.distributed.control import LOST_AFTER_S

    run = agent.run_folder()
    if config.least_nodes > 1 or run is None or settings.signals:
        return None
    settings.say("machine 0 does not answer: looking for a sign of it in the run's folder")
    holder = take_over(Path(run), rendezvous.launcher, silent_s=LOST_AFTER_S)
    if holder is None:
        return None
    settings.say(f"machine 0 is lost: machine {config.node_rank} goes on alone from the newest checkpoint")
    for name, value in rendezvous.user_interfaces.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return replace(settings, reporting_rank=0, holder=holder)


def _run(agent: "Agent", settings: "LaunchSettings", config: DistributedConfig) -> int:
    from llamahome.distributed.agent import GroupEnded
    from llamahome.distributed.rendezvous import Ended

    statuses: dict[int, int] = {}
    first, attempts = None, 1
    with _forward_signals(agent, settings.signals):
        try:
            agent.run()
        except GroupEnded as ended:
            statuses, first, attempts = ended.statuses, ended.first, ended.attempts
        except Ended as ended:
            if not agent.statuses:
                raise _error_with_machine(ended, config.node_rank) from None
            statuses = agent.statuses
        except LlamaHomeError:  # machine 0 is out of reach
            if not agent.statuses:
                raise
            statuses = agent.statuses  # processes failed here before, and nobody has shown their error yet
    if first is not None:
        last = failures.error_of_workers(settings.folder, statuses, reporting_rank=settings.reporting_rank, signals=[])
        raise type(first)([*first.problems, _crash_loop(last, attempts)])
    return failures.raise_for_workers(settings.folder, statuses, reporting_rank=settings.reporting_rank, signals=settings.signals)


def _crash_loop(last: LlamaHomeError, attempts: int) -> Problem:
    """The problem to show below the first failure when no restart is left."""
    message = f"this was the first of {attempts} failures, and no restart is left; the last one: {last.problems[0].message}"
    hint = "llamahome train-resume latest"
    return Problem(code="distributed.crash-loop", message=message, where="distributed.max_restarts", hint=hint)


def _error_with_machine(ended: "Ended", own_node: int) -> LlamaHomeError:
    """The error that ended all machines, with the number of the machine where it happened unless it is this one."""
    error = ended.payload.error()
    if ended.node in (None, own_node):
        return error
    return type(error)([replace(problem, message=f"on machine {ended.node}: {problem.message}") for problem in error.problems])


@contextmanager
def _launch_environment(folder: Path) -> Iterator[None]:
    """Set the environment that the workers inherit and keep the agent's log off the screen; restore both afterwards."""
    variables = {
        failures.LAUNCH_FOLDER: str(folder),
        failures.LAUNCHER_PID: str(os.getpid()),
        failures.RUN_TO_RESUME: "",
        failures.ATTEMPT: "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # otherwise the agent opens a port on all interfaces
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "",  # none, because _forward_signals does it
    }
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(_TORCH_AGENT_PREFIXES)]:
        del os.environ[name]
    logger = logging.getLogger("torch.distributed.elastic")
    propagated, logger.propagate = logger.propagate, False
    no_output = logging.NullHandler()
    logger.addHandler(no_output)
    os.environ.update(variables)
    try:
        yield
    finally:
        logger.removeHandler(no_output)
        logger.propagate = propagated
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _forward_signals(agent: "Agent", received: list[int]) -> Iterator[None]:
    """Forward each signal once to every worker (their process groups do not get it from the terminal) and add it to `received`."""

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        workers = [worker.id for worker in agent.get_worker_group().workers if isinstance(worker.id, int)]
        if not workers:
            raise KeyboardInterrupt
        for process in workers:
            try:
                os.killpg(process, _FORWARDED[signal.Signals(number)] if len(received) <= _FORWARDED_SIGNALS else signal.SIGKILL)
            except ProcessLookupError:
                continue

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
