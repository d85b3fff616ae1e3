"""The processes of a run: which one this is, and the few exchanges between them, which are nothing at one process.

Gradients are summed, never averaged: the step divides by the targets of the whole batch. Small decisions (stop, out of memory)
travel over gloo on the CPU even where gradients go over NCCL, so that they never wait for the device. No pickle crosses
processes: objects travel as JSON. Every method is called by all processes, in the same order.
"""

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from llamahome.config.schema import DistributedConfig, interval
from llamahome.distributed import failures, meeting
from llamahome.distributed.devices import device_here
from llamahome.distributed.place import Place, find_place, leftovers
from llamahome.distributed.processors import usable_cores
from llamahome.distributed.roll import Roll, arrive, processes
from llamahome.distributed.traffic import Traffic
from llamahome.errors import MachineError, Problem, Stopped

_joined = threading.Event()
"""Set once this process has met others."""


def threads_linger() -> bool:
    """Whether threads of torch's process groups may live on after the groups: Python's own end then aborts now and then.

    A thread of gloo that lets go of the last hold on a tensor while Python ends is thrown out in a place that may not throw
    ("terminate called without an active exception"). Whoever has nothing left to do leaves with os._exit.
    """
    return _joined.is_set()


@dataclass(frozen=True)
class World:
    """The place of this process among all."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    """Processes on this machine."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    roll: Roll = field(default_factory=Roll, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all processes."""
        self.start_sum_(tensor)()

    def start_sum_(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Begin to sum `tensor` in place; what is returned waits for the end. Several may be under way."""
        if self.size == 1:
            return lambda: None
        self.traffic.summed(tensor.numel() * tensor.element_size(), self.size)
        with _Exchange(self):
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _Exchange(self):
                work.wait()

        return wait

    def guarded(self) -> AbstractContextManager[None]:
        """Around an exchange that torch does itself: its failure becomes MachineError distributed.peer-lost."""
        return _Exchange(self)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one process."""
        return self.max(float(flag)) > 0

    def max(self, value: float) -> float:
        """The largest `value` of all processes; not a number if one of them is not."""
        if self.size == 1:
            return value
        nan_too = torch.tensor([value if value == value else float("inf"), float(value != value)], dtype=torch.float64)
        with _Exchange(self):
            dist.all_reduce(nan_too, op=dist.ReduceOp.MAX)
        return float("nan") if nan_too[1] > 0 else float(nan_too[0])

    def broadcast_object(self, value: Any) -> Any:
        """The JSON value of process 0 on every process; what the others pass is ignored."""
        if self.size == 1:
            return value
        written = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(written)])
        with _Exchange(self):
            dist.broadcast(length, src=0)
            letters = (
                torch.frombuffer(bytearray(written), dtype=torch.uint8) if self.is_main else torch.empty(int(length), dtype=torch.uint8)
            )
            dist.broadcast(letters, src=0)
        return json.loads(bytes(letters.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, by rank, on every process."""
        if self.size == 1:
            return [value]
        written = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _Exchange(self):
            dist.all_gather(lengths, torch.tensor([len(written)]))
            longest = int(max(lengths))
            padded = torch.cat([written, torch.zeros(longest - len(written), dtype=torch.uint8)])
            letters = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(letters, padded)
        return [json.loads(bytes(each[: int(length)].tolist())) for each, length in zip(letters, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    def sum_gradients_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace the gradient of every trained parameter by its sum over all processes; one exchange per dtype.

        A missing gradient counts as zeros. Afterwards the gradients are slices of one flat tensor, so nothing is copied back;
        while it fills, up to twice the memory of the gradients is in use.
        """
        trained = [each for each in parameters if each.requires_grad]
        if self.size == 1:
            return
        for dtype in sorted({each.dtype for each in trained}, key=str):
            same = [each for each in trained if each.dtype == dtype]
            flat, start = torch.zeros(sum(each.numel() for each in same), dtype=dtype, device=self.device), 0
            for each in same:
                view = flat.narrow(0, start, each.numel()).view(each.shape)
                if each.grad is not None:
                    view.copy_(each.grad)
                each.grad, start = view, start + each.numel()
            self.sum_(flat)


@contextmanager
def open_world(config: DistributedConfig, *, say: Callable[[str], None], processor: bool = False) -> Iterator[World]:
    """Join the other processes when torchrun or `launch` started this one, else be alone; leave at the end.

    `say` is told, on the main process, what was decided otherwise than configured; `processor` leaves accelerators alone. An error
    that passes through is left for the launcher.
    Raises ConfigError (more processes than GPUs), MachineError (the others cannot be reached).
    """
    place = find_place(os.environ)
    rank, size, local_rank, local_size = place.rank, place.size, place.local_rank, place.local_size
    folder = failures.launch_folder()
    with ExitStack() as stack:
        if folder is not None:
            done = threading.Event()
            stack.callback(done.set)
            failures.follow_launcher(done)
            stack.push(lambda kind, error, trace: _leave_word(error, rank, folder))
        speak = say if rank == 0 else lambda _: None
        world = World(rank, size, local_rank, device_here(local_rank, size, local_size, processor=processor), local_size)
        _divide_threads(stack, local_size, alone=size == 1)
        backend = _backend(config, world.device, speak)
        for name in leftovers(os.environ):
            speak(f"{name} in the environment is not obeyed: no launcher has set what belongs to it")
        if config.world_size not in ("auto", size) and place.joins:
            speak(f"distributed.world_size is {config.world_size}, but {size} processes were started: using {size}")
        if size > 1:
            _join(world, place, config, backend)
            stack.callback(dist.destroy_process_group)
            stack.push(lambda kind, error, trace: _leave_together(error, world))
        yield world


def _backend(config: DistributedConfig, device: torch.device, say: Callable[[str], None]) -> str:
    if config.backend == "nccl" and device.type != "cuda":
        say("distributed.backend nccl needs CUDA, which this machine does not have: using gloo")
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" and config.backend != "gloo" else "gloo"


def _divide_threads(stack: ExitStack, local_size: int, *, alone: bool) -> None:
    """Give each process of a machine its share of the cores; a number that the user chose (OMP_NUM_THREADS) stands.

    An outer torchrun puts OMP_NUM_THREADS=1 there by itself, which is nobody's choice.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen and (alone or failures.launch_folder() is not None or chosen != "1"):
        return
    before = torch.get_num_threads()
    share = max(1, usable_cores() // local_size)
    torch.set_num_threads(min(before, share) if alone else share)
    stack.callback(torch.set_num_threads, before)


def _join(world: World, place: Place, config: DistributedConfig, backend: str) -> None:
    """Meet the others. On one machine nothing listens beyond loopback: the processes meet over a file in the launch folder."""
    one_machine = place.size == place.local_size
    if one_machine:
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if loopback:
                os.environ.setdefault(variable, loopback)
    timeout, folder = timedelta(seconds=interval(config.timeout).value), failures.launch_folder()
    attempt = os.environ.get(failures.ROUND) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if one_machine and folder:
        store: Store = FileStore(f"{folder}/meeting-{attempt}", world.size)
        patience, waited = timeout, config.timeout
    else:
        patience, waited = timedelta(seconds=interval(config.join_timeout).value), config.join_timeout
        store = PrefixStore(f"llamahome-{attempt}", _open_store(place, config))
    missing = arrive(store, rank=world.rank, size=world.size, within=patience)
    if missing:
        message = f"{processes(missing)} of {world.size} did not arrive within {waited}"
        hint = (
            f"unset RANK WORLD_SIZE if nobody started {world.size} processes; --set distributed.join_timeout='10 min' if they are only slow"
        )
        raise MachineError(Problem(code="distributed.ranks-missing", message=message, where=place.starter, hint=hint))
    world.roll.open(PrefixStore("roll", store), rank=world.rank, size=world.size)
    _joined.set()
    with _Exchange(world):
        dist.init_process_group(backend, store=PrefixStore("group", store), rank=world.rank, world_size=world.size, timeout=timeout)


def _open_store(place: Place, config: DistributedConfig) -> Store:
    """The store that the launcher named; what it named may be left over from something else."""
    try:
        return meeting.open_store(place, config)
    except MachineError as error:
        if error.problems[0].code != "distributed.machines-not-met" or place.starter == "llamahome":
            raise
        where = f"{place.address or config.master_addr}:{place.port or config.master_port}"
        message = f"process {place.rank} of {place.size} found no process 0 at {where} within {config.join_timeout}"
        hint = f"unset RANK WORLD_SIZE if nobody started {place.size} processes, or start process 0"
        raise MachineError(Problem(code="distributed.machines-not-met", message=message, where=place.starter, hint=hint)) from error


_SOURCE_PLACE = re.compile(r"\[\S+:\d+\] ")
"""The C++ file and line in front of a message, which tells a reader nothing."""


class _Exchange:
    """Turns a failed exchange into MachineError distributed.peer-lost; running out of memory stays what it is."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            late = "imed out" in str(error) or "imeout" in str(error)
            why = "another process did not answer in time" if late else "another process has left"
            hint = "--set distributed.timeout='30 min' if it was only slow" if late else "llamahome train-resume latest"
            detail = _SOURCE_PLACE.sub("", str(error).splitlines()[0]).split(". This is")[0][:200]
            away = f": {', '.join(absent)} did not come" if (absent := self.world.roll.absent()) else ""
            message = f"process {self.world.rank} of {self.world.size} cannot go on {self.world.roll.phase}: {why}{away} ({detail})"
            raise MachineError(Problem(code=failures.PEER_LOST, message=message, hint=hint)) from error


def _leave_together(error: BaseException | None, world: World) -> None:
    """After an orderly stop nobody leaves before all have saved: the launcher ends the others once the first is gone."""
    if isinstance(error, Stopped):
        failures.leave_in_peace()
        world.barrier()


def _leave_word(error: BaseException | None, rank: int, folder: Path) -> None:
    """Leave the error that ends this process for its launcher, which alone speaks then; after a dead one, tidy up for it."""
    if failures.launcher_is_gone():
        shutil.rmtree(folder, ignore_errors=True)
    elif error is not None and not isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
        failures.record(error, rank=rank, folder=folder)
        failures.fall_silent()
