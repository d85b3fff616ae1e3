"""The rendezvous of torch's elastic agent: on one machine it is immediate, on several machines each round is one rendezvous.

Machine 0 decides the rounds (membership.py) and sends them to the others (control.py). The processes of a round meet in a store that the
launcher of machine 0 hosts for the whole launch, under the number of the round. torch's own dynamic rendezvous is not used because it
unpickles what the network sends (docs/decisions/0020).
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousGracefulExitError, RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from llamahome.config.schema import DistributedConfig, interval
from llamahome.distributed.connect import INTERFACES, interface_to, not_met, port_taken, quiet_stderr
from llamahome.distributed.control import LOST_AFTER_S, Client, Server, new_launcher_id
from llamahome.distributed.failures import SAVING_S, ErrorPayload
from llamahome.distributed.membership import GroupState, MemberFault, MemberReport, MembershipRules
from llamahome.errors import MachineError, Problem

CONTACT_LOST = "distributed.contact-lost"
_POLL_S = 0.1
_REJECTED_AFTER_S = LOST_AFTER_S + 8.0
"""How long to try to join under a node rank that is in use: its launcher may have died and not be counted as lost yet."""
_OTHERS_END_S = 60.0
_WAITING_MESSAGE_AFTER_S = 2.0


class Ended(Exception):
    """All machines end because of `payload`; `node` is where it happened, None if it belongs to no single machine."""

    def __init__(self, payload: ErrorPayload, node: int | None) -> None:
        super().__init__()
        self.payload, self.node = payload, node


class SingleNodeRendezvous(RendezvousHandler):
    """The rendezvous of one machine: every round is complete at once, and nothing listens."""

    def get_backend(self) -> str:
        """The name in torch's log."""
        return "single-node"

    def next_rendezvous(self) -> RendezvousInfo:
        """Rank 0 of 1. The processes meet in a file, so the address is unused."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """No other machine can join."""
        return 0

    def get_run_id(self) -> str:
        """The same for all launches."""
        return "llamahome"

    def shutdown(self) -> bool:
        """Nothing is open."""
        return True


class MembershipRendezvous(SingleNodeRendezvous):
    """The rendezvous of several machines."""

    def __init__(self, config: DistributedConfig, processes: int, *, say: Callable[[str], None]) -> None:
        """Start to listen (machine 0) or to report. Raises MachineError distributed.port-taken."""
        self._config, self._say = config, say
        self._report = MemberReport(node=config.node_rank, launcher=new_launcher_id(), num_nodes=str(config.num_nodes), processes=processes)
        self._store: TCPStore | None = None
        self._control: Server | Client = (
            self._start_server() if config.node_rank == 0 else Client(self._report, address=config.master_addr, port=config.master_port)
        )
        self._round = GroupState()
        """The group state when the current round began."""
        self._ending_seen_at: float | None = None
        self.user_interfaces = {name: os.environ.get(name) for name in INTERFACES}

    def _start_server(self) -> Server:
        config = self._config
        with quiet_stderr():
            self._store = TCPStore("localhost", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False)
        rules = MembershipRules(
            min_nodes=config.least_nodes,
            max_nodes=config.most_nodes,
            lost_after=LOST_AFTER_S,
            join_timeout=interval(config.join_timeout).value,
            max_restarts=config.max_restarts,
            not_met=ErrorPayload.of(not_met(config)),
        )
        try:
            server = Server(self._report, rules, port=config.master_port, store_port=self._store.port)
        except OSError as error:
            raise MachineError(port_taken(config.master_port, str(error.strerror))) from error
        server.reject_second_server(config.master_addr, config.master_port)
        return server

    def get_backend(self) -> str:
        """The name in torch's log."""
        return "llamahome"

    @property
    def use_agent_store(self) -> bool:
        """The launcher hosts the store, not process 0."""
        return True

    @property
    def launcher(self) -> str:
        """The random id of this launcher."""
        return self._report.launcher

    @property
    def is_first(self) -> bool:
        """Whether this is machine 0."""
        return self._config.node_rank == 0

    @property
    def process_counts(self) -> list[int]:
        """The number of processes of each machine of this round."""
        return [member.processes for member in self._round.members]

    @property
    def run(self) -> str | None:
        """Folder of the run that this round resumes."""
        return self._round.run

    @property
    def number(self) -> int:
        """The number of this round."""
        return self._round.round

    @property
    def may_save(self) -> bool:
        """Whether the processes that end now can save first: nothing has failed, another machine wants to join."""
        group = self._group()
        return group.regrouping and group.may_save

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until this machine is in a new round. Raises Ended, MachineError or ConfigError if there will be none."""
        if self._report.state != "failed":
            self._send(state="ready")
        started_at, announced = time.monotonic(), False
        while True:
            self._check_contact(started_at)
            group = self._group()
            if group.ending is not None:
                if group.ending.error is None:
                    raise RendezvousGracefulExitError
                raise Ended(group.ending.error, group.ending.node)
            launchers = [member.launcher for member in group.members]
            if group.round > self._round.round and not group.regrouping and self._report.launcher in launchers:
                return self._enter(group, launchers.index(self._report.launcher))
            if not announced and not self._round.round and time.monotonic() - started_at > _WAITING_MESSAGE_AFTER_S:
                announced = True
                config = self._config
                self._say(f"waiting up to {config.join_timeout} for the other machines at {config.master_addr}:{config.master_port}")
            time.sleep(_POLL_S)

    def _enter(self, group: GroupState, group_rank: int) -> RendezvousInfo:
        if group.reason:
            source = "from the newest checkpoint" if group.run else "from the start"
            count = f"with {len(group.members)} of {self._config.most_nodes} machines"
            self._say(f"{group.reason}: starting all processes again {count} {source}")
        self._round = group
        self._send(state="running", round=group.round, fault=None)
        reply = self._control.reply
        port = reply.store_port if reply is not None else 0
        return RendezvousInfo(HashStore(), group_rank, len(group.members), RendezvousStoreInfo(self._config.master_addr, port))

    def interface_variables(self) -> dict[str, str | None]:
        """Environment of the processes of this round: the interface that leads to machine 0, unless the user named one.

        A machine that is alone uses loopback, so that a cut cable does not affect it.
        """
        if len(self._round.members) == 1:
            return dict.fromkeys(INTERFACES)
        name = interface_to(self._config.master_addr)
        defaults = (name, name and f"={name}")  # NCCL reads a name without = as a prefix
        return {variable: self.user_interfaces[variable] or value for variable, value in zip(INTERFACES, defaults, strict=True)}

    def check_others(self, run: str | None) -> None:
        """Report `run`, the folder of the current run. Raises Ended or MachineError if the processes of this machine must end."""
        if run != self._report.run:
            self._send(run=run)
        self._check_contact(None)
        ending = self._group().ending
        if ending is None or ending.error is None:
            return
        now = time.monotonic()
        self._ending_seen_at = self._ending_seen_at or now
        if ending.error.kind != "Stopped" or now - self._ending_seen_at > SAVING_S:
            raise Ended(ending.error, ending.node)

    def report_failure(self, fault: MemberFault, run: str | None) -> None:
        """Tell machine 0 why the processes of this machine failed."""
        self._send(state="failed", fault=fault, run=run)

    def report_done(self) -> None:
        """Tell machine 0 that this machine is done, and wait until the others are done too."""
        self._send(state="done")
        deadline = time.monotonic() + _OTHERS_END_S
        while self._group().ending is None and self._control.silent_s < LOST_AFTER_S and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def num_nodes_waiting(self) -> int:
        """If it is more than 0, torch's agent ends the processes and calls next_rendezvous."""
        group = self._group()
        return int(group.ending is None and (group.regrouping or group.round > self._round.round))

    def _group(self) -> GroupState:
        reply = self._control.reply
        return reply.group if reply is not None else GroupState()

    def _send(self, **changes: object) -> None:
        self._report = replace(self._report, **changes)  # type: ignore[arg-type]
        self._control.send(self._report)

    def _check_contact(self, started_at: float | None) -> None:
        """MachineError if machine 0 is out of reach, ConfigError if it rejects this launcher (see _REJECTED_AFTER_S)."""
        reply, config = self._control.reply, self._config
        if reply is None:
            if self._control.silent_s > interval(config.join_timeout).value:
                raise not_met(config, self._control.last_error)
            return
        if reply.rejection is not None:
            is_final = started_at is None or config.node_rank == 0 or time.monotonic() - started_at > _REJECTED_AFTER_S
            if is_final:
                raise reply.rejection.error()
        if self._control.silent_s > LOST_AFTER_S:
            raise MachineError(
                Problem(
                    code="distributed.contact-lost",
                    message=f"machine 0 ({config.master_addr}) did not answer for {LOST_AFTER_S:g} s: this machine ends its processes",
                    where="distributed.master_addr",
                    hint="if machine 0 is still running, the same command again; otherwise, on all machines, "
                    f"llamahome train-resume latest --set distributed.node_rank={config.node_rank} (with the machine's own number)",
                )
            )

    def is_closed(self) -> bool:
        """Whether all machines are to end."""
        return self._group().ending is not None

    def shutdown(self) -> bool:
        """Leave the group."""
        self._control.close()
        return True
