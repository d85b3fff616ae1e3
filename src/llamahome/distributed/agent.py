"""torch's elastic agent with our judgement: what is worth another attempt, and what the next attempt must know.

Another attempt is worth it when a process was killed, or lost the others. What would fail again is not: a mistake in settings or data,
a loss that diverged, an orderly stop, a defect before anything was begun. Each attempt is all processes anew, from the newest checkpoint.
"""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from llamahome.distributed import failures
from llamahome.distributed.failures import Failure, Told
from llamahome.distributed.outcome import outcome_as_error
from llamahome.distributed.rendezvous import Ended, Rounds
from llamahome.distributed.rounds import Fault
from llamahome.errors import LlamaHomeError, Stopped

ENDLESS = 10**6
"""Restarts that torch's agent is allowed; ours are counted here, for it counts without judging."""
_NO_WAIT_S = 0.1
_SAVING_S = 120
_LEAVING_S = 10
_ASKED_TO_END = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What the agent goes by."""

    folder: Path
    """Of the launch: where the processes leave word."""
    max_restarts: int
    spoken_by: int
    """The process that speaks on the screen of this machine; -1 when none does."""
    asked: list[int]
    """Signals that came so far."""
    say: Callable[[str], None]


class GroupEnded(Exception):
    """The processes have ended for good; carries the exit status of each that failed."""

    def __init__(self, statuses: Mapping[int, int]) -> None:
        super().__init__()
        self.statuses = dict(statuses)


def is_worth_another_attempt(statuses: Mapping[int, int], told: Sequence[Failure], *, begun: bool) -> bool:
    """Judge the exit statuses of failed processes and what they told, the cause first; `begun` when a run exists to go on with."""
    if told and not told[0].is_consequence:
        return begun and told[0].error.problems[0].code == failures.DEFECT
    killed = any(status < 0 and status not in _ASKED_TO_END for status in statuses.values())
    return killed or bool(told)


class Agent(LocalElasticAgent):
    """Starts and watches the processes of this machine."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, orders: Orders) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=_NO_WAIT_S)
        self._orders = orders
        self._rounds = spec.rdzv_handler if isinstance(spec.rdzv_handler, Rounds) else None
        self.restarts = 0
        self.statuses: dict[int, int] = {}
        """Exit statuses of the processes that failed here in this round, but for those that merely lost a peer."""

    def _assign_worker_ranks(self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec) -> list[Worker]:
        counts = self._rounds.counts if self._rounds else [spec.local_world_size]
        first, size = sum(counts[:group_rank]), sum(counts)
        places = [(local, first + local) for local in range(spec.local_world_size)]
        return [Worker(local, global_rank=rank, role_rank=rank, world_size=size, role_world_size=size) for local, rank in places]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        failures.forget(self._orders.folder)
        self.statuses = {}
        os.environ[failures.BEGUN] = self._begun() or ""
        os.environ[failures.ROUND] = str(self._rounds.number if self._rounds else self.restarts)
        for name, value in (self._rounds.variables() if self._rounds else {}).items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _begun(self) -> str | None:
        """The run to go on with; a machine that came later has not begun it itself."""
        return (self._rounds.run if self._rounds else None) or failures.noted_run(self._orders.folder)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """On several machines the processes wait for others that are gone: there is nothing that they could still save."""
        if self._rounds is None:
            super()._stop_workers(worker_group)
        elif self._rounds.is_gentle:
            self._shutdown(signal.SIGTERM, timeout=_SAVING_S)
        elif self._has_stopped():
            self._shutdown(signal.SIGTERM, timeout=_LEAVING_S)  # all have saved when the first has left
        else:
            self._shutdown(signal.SIGKILL, timeout=_LEAVING_S)

    def _has_stopped(self) -> bool:
        told = failures.recorded(self._orders.folder)
        return bool(told) and isinstance(told[0].error, Stopped)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._judge({rank: failure.exitcode for rank, failure in result.failures.items()})
        elif result.state == WorkerState.HEALTHY and self._rounds is not None:
            try:
                self._rounds.heed(failures.noted_run(self._orders.folder))
            except (Ended, LlamaHomeError):
                self._stop_workers(worker_group)
                raise
        return result

    def _exit_barrier(self) -> None:
        if self._rounds is not None:
            self._rounds.finished()

    def _judge(self, statuses: Mapping[int, int]) -> None:
        """Raise GroupEnded unless the processes are to be started again; torch's agent does that when nothing is raised."""
        told = failures.recorded(self._orders.folder)
        begun = self._begun() is not None
        worth = is_worth_another_attempt(statuses, told, begun=begun)
        if self._rounds is not None:
            error = outcome_as_error(self._orders.folder, statuses, spoken_by=self._orders.spoken_by, asked=self._orders.asked)
            lost = error.problems[0].code == failures.PEER_LOST
            self.statuses = {} if lost else dict(statuses)
            stop = isinstance(error, Stopped) and not self._orders.asked
            fault = Fault(error=Told.of(error), worth=worth and not self._orders.asked, is_consequence=lost, is_stop=stop)
            self._rounds.failed(fault, self._begun())
            return
        if self._orders.asked or not worth or self.restarts >= self._orders.max_restarts:
            raise GroupEnded(statuses)
        self.restarts += 1
        again = "from the newest checkpoint" if begun else "from the start"
        self._orders.say(f"{_cause(statuses, told)}: starting all processes again {again} ({self.restarts} of {self._orders.max_restarts})")


def _cause(statuses: Mapping[int, int], told: Sequence[Failure]) -> str:
    killed = {rank: status for rank, status in statuses.items() if status < 0 and status not in _ASKED_TO_END}
    if killed:
        rank, status = min(killed.items())
        return f"process {rank} was killed by {signal.Signals(-status).name}"
    return told[0].error.problems[0].message


class Alone(RendezvousHandler):
    """The meeting of one machine with itself: every round is complete at once, and nothing listens."""

    def get_backend(self) -> str:
        """How torch calls it in its log."""
        return "alone"

    def next_rendezvous(self) -> RendezvousInfo:
        """Rank 0 of 1; the processes meet over a file of their own, so no address is needed."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """There is nobody to tell."""

    def num_nodes_waiting(self) -> int:
        """Nobody else can come."""
        return 0

    def get_run_id(self) -> str:
        """Of the launch."""
        return "llamahome"

    def shutdown(self) -> bool:
        """Nothing is open."""
        return True
