"""torch's elastic agent with our decision whether to restart: only if another attempt may succeed.

Another attempt may succeed if a process was killed, or lost a peer, or failed unexpectedly after the run had started. It would fail again
after a mistake in settings or data, a diverged loss or an orderly stop. An attempt starts all processes again from the newest checkpoint.
A process that makes no progress has ended itself (watchdog.py), and another attempt may succeed.
"""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs

from llamahome.distributed import failures
from llamahome.distributed.failures import ErrorPayload, Failure, error_of_workers
from llamahome.distributed.holder import Holder
from llamahome.distributed.membership import MemberFault
from llamahome.distributed.rendezvous import Ended, MembershipRendezvous
from llamahome.errors import LlamaHomeError, Stopped

UNLIMITED = 10**6
"""max_restarts for torch's agent, which would count every restart; `Agent` counts its own."""
_EXIT_BARRIER_S = 0.1
_KILL_AFTER_S = 10
_MENDED_BY_TIME = (failures.DEFECT, failures.HUNG, "checkpoint.ranks-differ")
_STOP_SIGNALS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """What the agent needs to know about the launch."""

    folder: Path
    """The launch folder, in which workers write their failures."""
    max_restarts: int
    reporting_rank: int
    """The rank whose output this machine shows; -1 if none."""
    say: Callable[[str], None]
    signals: list[int] = field(default_factory=list)
    """Signals received so far."""
    holder: Holder | None = None
    """The claim on the run of a machine that goes on alone."""


class GroupEnded(Exception):
    """The processes have ended and are not restarted; carries the exit statuses of those that failed."""

    def __init__(self, statuses: Mapping[int, int], *, first: LlamaHomeError | None = None, attempts: int = 1) -> None:
        """`first` is the error of the first attempt if this was the last one allowed."""
        super().__init__()
        self.statuses, self.first, self.attempts = dict(statuses), first, attempts


def is_retryable(statuses: Mapping[int, int], causes: Sequence[Failure], *, has_run: bool) -> bool:
    """Whether another attempt may succeed, given the exit statuses of failed processes and the failures they wrote, the cause first.

    `has_run` says whether a run exists that the next attempt can resume.
    """
    if causes and not causes[0].is_consequence:
        return has_run and causes[0].error.problems[0].code in _MENDED_BY_TIME
    return bool(causes) or _killed(statuses) is not None


def _killed(statuses: Mapping[int, int]) -> tuple[int, int] | None:
    """The lowest rank that was killed and did not just obey a request to stop, with its exit status."""
    return min(((rank, status) for rank, status in statuses.items() if status < 0 and status not in _STOP_SIGNALS), default=None)


class Agent(LocalElasticAgent):
    """Starts and watches the processes of this machine."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, settings: LaunchSettings) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=_EXIT_BARRIER_S)
        self._settings = settings
        self._membership = spec.rdzv_handler if isinstance(spec.rdzv_handler, MembershipRendezvous) else None
        self.restarts = 0
        self._first: LlamaHomeError | None = None
        self._holder = settings.holder
        self.statuses: dict[int, int] = {}
        """Exit statuses of the processes that failed here in this round, unless they only lost a peer."""

    def _assign_worker_ranks(self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec) -> list[Worker]:
        """As torch's, without the exchange over `store`, because the group state contains the process counts."""
        counts = self._membership.process_counts if self._membership else [spec.local_world_size]
        first, size = sum(counts[:group_rank]), sum(counts)
        ranks = range(first, first + spec.local_world_size)
        return [Worker(rank - first, global_rank=rank, role_rank=rank, world_size=size, role_world_size=size) for rank in ranks]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._settings.signals:
            raise KeyboardInterrupt  # it came between two attempts, when there was no process to forward it to
        failures.remove_failures(self._settings.folder)
        self.statuses = {}
        os.environ[failures.RUN_TO_RESUME] = self.run_folder() or ""
        os.environ[failures.ATTEMPT] = str(self._membership.number if self._membership else self.restarts)
        for name, value in (self._membership.interface_variables() if self._membership else {}).items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        processes: dict[int, Any] = super()._start_workers(worker_group)
        return processes

    def run_folder(self) -> str | None:
        """The run to resume. A machine that joined later learns it from the group."""
        return (self._membership.run if self._membership else None) or failures.noted_run(self._settings.folder)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """On several machines the processes cannot save once another machine has failed, so they are killed."""
        if self._membership is None:
            super()._stop_workers(worker_group)
        elif self._membership.may_save:
            self._shutdown(signal.SIGTERM, timeout=int(failures.SAVING_S))
        elif self._has_stopped():
            self._shutdown(signal.SIGTERM, timeout=_KILL_AFTER_S)  # all have saved once the first has left
        else:
            self._shutdown(signal.SIGKILL, timeout=_KILL_AFTER_S)

    def _has_stopped(self) -> bool:
        causes = failures.read_failures(self._settings.folder)
        return bool(causes) and isinstance(causes[0].error, Stopped)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            statuses = {rank: failure.exitcode for rank, failure in result.failures.items()}
            if self._membership is None:
                self._restart_or_end(statuses)
            else:
                self._report_failure(self._membership, statuses)
        elif result.state == WorkerState.HEALTHY:
            try:
                self._hold()
                if self._membership is not None:
                    self._membership.check_others(failures.noted_run(self._settings.folder))
            except (Ended, LlamaHomeError):
                self._stop_workers(worker_group)
                raise
        return result

    def _hold(self) -> None:
        """Renew the claim of machine 0, or of a machine that goes on alone, on the run."""
        if self._holder is None and self._membership is not None and self._membership.is_first:
            run = failures.noted_run(self._settings.folder)
            self._holder = Holder(Path(run), self._membership.launcher) if run is not None else None
        if self._holder is not None:
            self._holder.renew()

    def _exit_barrier(self) -> None:
        if self._membership is not None:
            self._membership.report_done()

    def _report_failure(self, rendezvous: MembershipRendezvous, statuses: Mapping[int, int]) -> None:
        """Report to machine 0, which decides whether all processes start again."""
        settings, run = self._settings, self.run_folder()
        retryable = is_retryable(statuses, failures.read_failures(settings.folder), has_run=run is not None)
        error = error_of_workers(settings.folder, statuses, reporting_rank=settings.reporting_rank, signals=settings.signals)
        is_consequence = error.problems[0].code == failures.PEER_LOST
        self.statuses = {} if is_consequence else dict(statuses)
        fault = MemberFault(
            error=ErrorPayload.of(error),
            retryable=retryable and not settings.signals,
            is_consequence=is_consequence,
            is_stop=isinstance(error, Stopped) and not settings.signals,
        )
        rendezvous.report_failure(fault, run)

    def _restart_or_end(self, statuses: Mapping[int, int]) -> None:
        """Return if torch's agent is to start the processes again, raise GroupEnded if not."""
        settings, causes = self._settings, failures.read_failures(self._settings.folder)
        has_run, alone = self.run_folder() is not None, self._worker_group.spec.local_world_size == 1
        if settings.signals or not is_retryable(statuses, causes, has_run=has_run):
            raise GroupEnded(statuses)
        if self.restarts >= settings.max_restarts:
            raise GroupEnded(statuses, first=self._first, attempts=self.restarts + 1)
        if self._first is None:
            self._first = error_of_workers(settings.folder, statuses, reporting_rank=settings.reporting_rank, signals=[])
        self.restarts += 1
        killed = _killed(statuses)
        if killed is None or (causes and not causes[0].is_consequence):
            cause = causes[0].error.problems[0].message  # a process that hung was killed only because of it
        else:
            cause = f"process {killed[0]} was killed by {signal.Signals(-killed[1]).name}"
        source = "from the newest checkpoint" if has_run else "from the start"
        who = "the process" if alone else "all processes"
        settings.say(f"{cause}: starting {who} again {source} ({self.restarts} of {settings.max_restarts})")
