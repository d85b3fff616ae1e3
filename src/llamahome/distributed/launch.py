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
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from llamahome.config.schema import DistributedConfig
from llamahome.distributed import failures, meeting
from llamahome.distributed.place import find_place
from llamahome.errors import ConfigError, LeftAtOnce, LlamaHomeError, MachineError, Problem

if TYPE_CHECKING:
    from llamahome.distributed.agent import Agent

MODULE = ("-m", "llamahome")
_FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}
"""What comes and what the workers get: a closed terminal (SIGHUP) asks for an orderly stop like SIGTERM."""
_EXCERPT_LINES = 20
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
    size = max(1, gpus) * config.num_nodes if config.world_size == "auto" else config.world_size
    problems = []
    if config.node_rank >= config.num_nodes:
        problems.append(
            Problem(
                code="distributed.node-rank-too-large",
                message=f"this machine is number {config.node_rank}, but there are {config.num_nodes} (numbered from 0)",
                where="distributed.node_rank",
                hint=f"--node-rank 0 to {config.num_nodes - 1}, or --num-nodes {config.node_rank + 1}",
            )
        )
    if size % config.num_nodes:
        below = size // config.num_nodes * config.num_nodes
        fits = " or ".join(str(each) for each in (below, below + config.num_nodes) if each)
        problems.append(
            Problem(
                code="distributed.world-size-not-divisible",
                message=f"{size} processes cannot be shared out evenly over {config.num_nodes} machines",
                where="distributed.world_size",
                hint=f"--world-size {fits}",
            )
        )
    elif gpus and size // config.num_nodes > gpus:
        problems.append(
            Problem(
                code="distributed.more-processes-than-gpus",
                message=f"{size // config.num_nodes} processes on this machine, which has {gpus} GPUs",
                where="distributed.world_size",
                hint=f"--world-size {gpus * config.num_nodes}",
            )
        )
    if problems:
        raise ConfigError(problems)
    return 0 if size == 1 else size // config.num_nodes


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
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from llamahome.distributed.agent import ENDLESS, Agent, Alone, GroupEnded, Orders

    count = needs_launch(config, {})
    if config.num_nodes > 1:
        meeting.require_meeting_place(config)
    with tempfile.TemporaryDirectory(prefix="llamahome-launch-") as name:
        folder = Path(name)
        spoken_by = 0 if config.node_rank == 0 else -1
        asked: list[int] = []
        statuses: dict[int, int] = {}
        with _prepared(folder):
            rendezvous: RendezvousHandler = Alone()
            if config.num_nodes > 1:
                rendezvous = get_rendezvous_handler(RendezvousParameters(**meeting.parameters(config, folder)))
            spec = WorkerSpec(
                role="llamahome",
                local_world_size=count,
                entrypoint=sys.executable,
                args=tuple(word.replace("$", "$$") for word in (*entry, *command_argv)),  # the agent fills in ${local_rank}
                rdzv_handler=rendezvous,
                max_restarts=ENDLESS,
                monitor_interval=0.1,
                master_addr=config.master_addr if config.num_nodes > 1 else None,
                master_port=config.master_port if config.num_nodes > 1 else None,
                local_addr="127.0.0.1" if config.num_nodes == 1 else None,
            )
            quiet = {local: Std.ALL for local in range(count) if local != spoken_by}
            orders = Orders(folder=folder, max_restarts=config.max_restarts if config.num_nodes == 1 else 0, asked=asked, say=say)
            agent = Agent(spec, DefaultLogsSpecs(log_dir=str(folder / "output"), redirects=quiet), orders)
            with _forwarding(agent, asked), meeting.reaching(config):
                try:
                    agent.run()
                except GroupEnded as ended:
                    statuses = ended.statuses
                rendezvous.shutdown()
        return _outcome(folder, statuses, spoken_by=spoken_by, asked=asked)


@contextmanager
def _prepared(folder: Path) -> Iterator[None]:
    """The environment that the workers inherit, and the agent's own log kept off the screen; both as before afterwards."""
    settings = {
        failures.LAUNCH_FOLDER: str(folder),
        failures.LAUNCHER_PID: str(os.getpid()),
        failures.BEGUN: "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or the agent opens a port on all interfaces
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "",  # none: _forwarding does it
    }
    before = {name: os.environ.get(name) for name in settings}
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
                del os.environ[name]
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


def _outcome(folder: Path, statuses: Mapping[int, int], *, spoken_by: int, asked: Sequence[int]) -> int:
    """0, or the exit status of a process that told its reason itself; raises what nobody has told yet."""
    if not statuses:
        return 0
    told = failures.recorded(folder)
    if told and not told[0].is_consequence:
        raise told[0].error
    if statuses.get(spoken_by, 0) > 0 and spoken_by not in {failure.rank for failure in told}:
        return statuses[spoken_by]
    if asked and not told:
        raise LeftAtOnce(Problem(code="run.left-at-once", message=f"stopped by {signal.Signals(asked[-1]).name} before anything was saved"))
    if not told and all(status == -signal.SIGTERM for status in statuses.values()):
        raise LeftAtOnce(Problem(code="run.left-at-once", message="a process was stopped by SIGTERM before anything was saved"))
    killed = {rank: status for rank, status in statuses.items() if status < 0 and status != -signal.SIGTERM}
    if killed:
        raise MachineError(_killed(*min(killed.items())))
    if told:
        raise told[0].error
    rank, status = min(statuses.items(), key=lambda each: (each[1] < 0, each[0]))
    raise _found_in_output(folder, rank, status)


def _killed(rank: int, status: int) -> Problem:
    number = signal.Signals(-status)
    why = ", which is how the system answers when memory runs out" if number == signal.SIGKILL else ""
    return Problem(
        code="distributed.process-killed",
        message=f"process {rank} was killed by {number.name}{why}",
        hint="llamahome train-resume latest",
    )


def _found_in_output(folder: Path, rank: int, status: int) -> LlamaHomeError:
    """For a process that ended before it could leave word: the end of what it wrote to stderr, and the same exit status."""
    attempt = max(folder.glob("output/*/attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_")))
    streams = list(attempt.glob("*/stderr.log"))
    processes = len(list(attempt.glob("*")))
    mine = [path for path in streams if int(path.parent.name) == rank % processes]
    written = mine[0].read_text(encoding="utf-8", errors="replace").strip() if mine else ""
    excerpt = "\n".join(written.splitlines()[-_EXCERPT_LINES:]) or None
    kinds: dict[int, type[LlamaHomeError]] = {kind.exit_status: kind for kind in LlamaHomeError.__subclasses__()}
    message = f"process {rank} ended with exit status {status} before it had started its work"
    return kinds.get(status, LlamaHomeError)(Problem(code="distributed.process-failed", message=message, excerpt=excerpt))
