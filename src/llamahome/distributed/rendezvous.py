"""torch's agent on several machines: each round is a rendezvous, decided by machine 0 (rounds.py) and told by it (contact.py).

The processes of a round meet in a store that machine 0's launcher keeps for the whole launch, under the number of the round.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousGracefulExitError, RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from llamahome.config.schema import DistributedConfig, interval
from llamahome.distributed.contact import SILENCE_S, Guest, Host, Word, new_launcher
from llamahome.distributed.failures import Told
from llamahome.distributed.interfaces import route_to
from llamahome.distributed.meeting import not_met, port_taken, without_chatter
from llamahome.distributed.rounds import Board, Fault, Report, Rules
from llamahome.errors import MachineError, Problem

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_LOOK_S = 0.1
_REFUSAL_S = SILENCE_S + 8.0
"""A launcher that died has its place for as long as it is not known to be lost."""
_OTHERS_END_S = 60.0
_SAVING_S = 120.0
_TELL_AFTER_S = 2.0


class Ended(Exception):
    """All machines end because of `told`; `node` is where it happened, None when it is nobody's own."""

    def __init__(self, told: Told, node: int | None) -> None:
        super().__init__()
        self.told, self.node = told, node


class Rounds(RendezvousHandler):
    """The place of this machine in each round."""

    def __init__(self, config: DistributedConfig, processes: int, *, say: Callable[[str], None]) -> None:
        """Begin to listen, or to ask. MachineError distributed.port-taken."""
        self._config, self._say = config, say
        self._report = Report(node=config.node_rank, launcher=new_launcher(), machines=str(config.num_nodes), processes=processes)
        self._store: TCPStore | None = None
        self._contact: Host | Guest = self._host() if config.node_rank == 0 else self._guest()
        self._board = Board()
        self._heard_end_at: float | None = None
        self._chosen = {name: os.environ.get(name) for name in INTERFACES}

    def _host(self) -> Host:
        config = self._config
        with without_chatter():
            self._store = TCPStore("localhost", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False)
        rules = Rules(
            least=config.least_nodes,
            most=config.most_nodes,
            silence=SILENCE_S,
            patience=interval(config.join_timeout).value,
            max_restarts=config.max_restarts,
            not_met=Told.of(not_met(config)),
        )
        try:
            host = Host(self._report, rules, port=config.master_port, store_port=self._store.port)
        except OSError as error:
            raise MachineError(port_taken(config.master_port, str(error.strerror))) from error
        host.look_for_another(config.master_addr, config.master_port)
        return host

    def _guest(self) -> Guest:
        return Guest(self._report, address=self._config.master_addr, port=self._config.master_port)

    def get_backend(self) -> str:
        """How torch calls it in its log."""
        return "llamahome"

    @property
    def use_agent_store(self) -> bool:
        """The processes keep no store of their own."""
        return True

    @property
    def counts(self) -> list[int]:
        """Processes of each machine of this round."""
        return [member.processes for member in self._board.members]

    @property
    def run(self) -> str | None:
        """Folder of the run that goes on in this round."""
        return self._board.run

    @property
    def number(self) -> int:
        """Of this round."""
        return self._board.round

    @property
    def is_gentle(self) -> bool:
        """Whether the processes that end now may save first: nothing has failed, another machine wants to join."""
        return self._current().gathering and self._current().gently

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until this machine is in a round. Raises Ended, MachineError or ConfigError when there will be none."""
        if self._report.state != "failed":
            self._tell(state="ready")
        began, said = time.monotonic(), False
        while True:
            self._require_contact(began)
            board = self._current()
            if board.ending is not None:
                if board.ending.error is None:
                    raise RendezvousGracefulExitError
                raise Ended(board.ending.error, board.ending.node)
            place = self._place_in(board)
            if board.round > self._board.round and not board.gathering and place is not None:
                return self._enter(board, place)
            if not said and not self._board.round and time.monotonic() - began > _TELL_AFTER_S:
                said = True
                config = self._config
                self._say(f"waiting up to {config.join_timeout} for the other machines at {config.master_addr}:{config.master_port}")
            time.sleep(_LOOK_S)

    def _place_in(self, board: Board) -> int | None:
        return next((place for place, member in enumerate(board.members) if member.launcher == self._report.launcher), None)

    def _enter(self, board: Board, place: int) -> RendezvousInfo:
        if board.why:
            again = "from the newest checkpoint" if board.run else "from the start"
            others = f"with {len(board.members)} of {self._config.most_nodes} machines "
            self._say(f"{board.why}: starting all processes again {others}{again}")
        self._board = board
        self._tell(state="running", round=board.round, fault=None)
        word = self._contact.word or Word()
        return RendezvousInfo(HashStore(), place, len(board.members), RendezvousStoreInfo(self._config.master_addr, word.store_port))

    def variables(self) -> dict[str, str | None]:
        """Environment of the processes of this round: the interface that leads to machine 0, unless the user named one.

        A machine that is alone exchanges over loopback, which no cut cable touches.
        """
        if len(self._board.members) == 1:
            return dict.fromkeys(INTERFACES)
        name = route_to(self._config.master_addr)
        found = dict(zip(INTERFACES, (name, name and f"={name}"), strict=True))  # NCCL takes a bare name for a prefix
        return {variable: self._chosen[variable] or found[variable] for variable in INTERFACES}

    def heed(self, run: str | None) -> None:
        """Look what the others do while the processes here are at work on `run`. Raises Ended or MachineError when these must end."""
        if run != self._report.run:
            self._tell(run=run)
        self._require_contact(None)
        ending = self._current().ending
        if ending is None or ending.error is None:
            return
        now = time.monotonic()
        self._heard_end_at = self._heard_end_at or now
        if ending.error.kind != "Stopped" or now - self._heard_end_at > _SAVING_S:
            raise Ended(ending.error, ending.node)

    def failed(self, fault: Fault, run: str | None) -> None:
        """Tell machine 0 why the processes here have failed."""
        self._tell(state="failed", fault=fault, run=run)

    def finished(self) -> None:
        """Tell that all is done here, and wait until the others are done as well."""
        self._tell(state="done")
        deadline = time.monotonic() + _OTHERS_END_S
        while self._current().ending is None and self._contact.silence < SILENCE_S and time.monotonic() < deadline:
            time.sleep(_LOOK_S)

    def num_nodes_waiting(self) -> int:
        """More than 0 makes torch's agent end the processes and come to the next rendezvous."""
        board = self._current()
        return int(board.ending is None and (board.gathering or board.round > self._board.round))

    def _current(self) -> Board:
        word = self._contact.word
        return word.board if word is not None else Board()

    def _tell(self, **changes: object) -> None:
        self._report = replace(self._report, **changes)  # type: ignore[arg-type]
        self._contact.tell(self._report)

    def _require_contact(self, began: float | None) -> None:
        """MachineError when machine 0 is out of reach, ConfigError when it does not take this launcher (not at once: see _REFUSAL_S)."""
        word, config = self._contact.word, self._config
        if word is None:
            if self._contact.silence > interval(config.join_timeout).value:
                raise not_met(config, self._contact.last_trouble)
            return
        if word.refused is not None and (began is None or config.node_rank == 0 or time.monotonic() - began > _REFUSAL_S):
            raise word.refused.error()
        if self._contact.silence > SILENCE_S:
            raise MachineError(
                Problem(
                    code="distributed.contact-lost",
                    message=f"machine 0 ({config.master_addr}) did not answer for {SILENCE_S:g} s: this machine ends its processes",
                    where="distributed.master_addr",
                    hint="the same command again if machine 0 goes on; else, on all machines, "
                    f"llamahome train-resume latest --set distributed.node_rank={config.node_rank} (with the machine's own number)",
                )
            )

    def is_closed(self) -> bool:
        """Whether all are to end."""
        return self._current().ending is not None

    def set_closed(self) -> None:
        """Machine 0 decides when all end."""

    def get_run_id(self) -> str:
        """Of the launch."""
        return "llamahome"

    def shutdown(self) -> bool:
        """Take leave of the others."""
        self._contact.close()
        return True
