"""The ranks of a run: which one this process is, and the collectives between them, which do nothing if there is only one process.

Gradients are summed, never averaged: the step divides by the number of targets of the whole batch. Small decisions (stop, out of memory)
travel over gloo on the CPU even if gradients travel over NCCL, so they never wait for the device. Objects travel as JSON, never as pickle.
All processes call every method, in the same order.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llamahome.config.schema import DistributedConfig
from llamahome.distributed import failures
from llamahome.distributed.connect import join_group
from llamahome.distributed.devices import device_here
from llamahome.distributed.processors import usable_cores
from llamahome.distributed.rank_info import find_rank_info, leftovers
from llamahome.distributed.rank_status import RankStatus
from llamahome.errors import MachineError, Problem, Stopped
from llamahome.progress_marks import NO_LIMIT, marks

_joined = threading.Event()
"""Set once this process has joined a group."""


def threads_linger() -> bool:
    """Whether threads of torch's process groups may still run after the groups are destroyed; then leave with os._exit.

    If a gloo thread releases the last reference to a tensor while Python shuts down, the process sometimes aborts
    ("terminate called without an active exception").
    """
    return _joined.is_set()


@dataclass
class Traffic:
    """Bytes and collectives of this process since the last `take`. Not thread-safe; `World.beside` has its own for another thread.

    A ring of n processes sends (n - 1) / n of the data in a gather or a scatter and twice that in a sum, which is a scatter and a gather.
    No algorithm sends less per process (Patarasuk and Yuan, 2009). tests/distributed/test_placements.py compares this with the network.
    """

    sent: float = 0.0
    exchanges: int = 0

    def summed(self, size: int, ranks: int) -> None:
        """Count a sum of `size` bytes over `ranks`."""
        self._add(2 * size * (ranks - 1) / ranks)

    def gathered(self, size: int, ranks: int) -> None:
        """Count an all-gather or a reduce-scatter; `size` is the number of bytes of all ranks together."""
        self._add(size * (ranks - 1) / ranks)

    def _add(self, sent: float) -> None:
        if sent:
            self.sent += sent
            self.exchanges += 1

    def take(self) -> dict[str, float]:
        """The counts under their metric names, then start again from zero. Empty if nothing was sent."""
        sent, exchanges, self.sent, self.exchanges = self.sent, self.exchanges, 0.0, 0
        return {"net/sent": sent, "net/exchanges": exchanges} if exchanges else {}


@dataclass(frozen=True)
class World:
    """Rank, device and collectives of one process."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    """Processes on this machine."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    rank_status: RankStatus = field(default_factory=RankStatus, compare=False)
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    """Which group the collectives run in; None: the one that all processes joined."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which shows messages and writes files."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all processes."""
        self.start_sum_(tensor)()

    def start_sum_(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Begin to sum `tensor` in place; the returned function waits for the result. Several sums may be in flight."""
        if self.size == 1:
            return lambda: None
        self.traffic.summed(tensor.numel() * tensor.element_size(), self.size)
        with self.guarded():
            work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def wait() -> None:
            with self.guarded():
                work.wait()

        return wait

    def beside(self, timeout: timedelta) -> "World":
        """The same processes with a gloo group of their own, so that a second thread may exchange small values beside the loop.

        All processes call it. What is sent is not counted as the loop's traffic.
        """
        if self.size == 1:
            return self
        with self.guarded():
            return replace(self, group=dist.new_group(backend="gloo", timeout=timeout), traffic=Traffic())

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A context for collectives: a failure inside becomes MachineError distributed.peer-lost; out of memory passes unchanged."""
        try:
            with marks.allowing(NO_LIMIT):  # distributed.timeout is the limit
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise MachineError(_peer_lost(self, str(error))) from error

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one process."""
        return self.max(float(flag)) > 0

    def max(self, value: float) -> float:
        """The largest `value` of all processes; NaN if one of them is NaN."""
        if self.size == 1:
            return value
        largest = torch.tensor([value if value == value else float("inf"), float(value != value)], dtype=torch.float64)
        with self.guarded():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return float("nan") if largest[1] > 0 else float(largest[0])

    def broadcast_object(self, value: Any) -> Any:
        """The JSON value of process 0; the values of the other processes are ignored."""
        return self.gather(value if self.is_main else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, by rank; every process gets them."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.guarded():
            dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
            longest = int(max(lengths))
            padded = torch.cat([data, torch.zeros(longest - len(data), dtype=torch.uint8)])
            texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, padded, group=self.group)
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def sum_gradients_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace the gradient of every trained parameter by its sum over all processes; one collective per dtype.

        A missing gradient counts as zeros. Afterwards the gradients are views of one flat tensor. While it is filled, up to twice the
        memory of the gradients is in use.
        """
        trained = [each for each in parameters if each.requires_grad]
        if self.size == 1:
            return
        for dtype in sorted({each.dtype for each in trained}, key=str):
            self.sum_(flatten_gradients([each for each in trained if each.dtype == dtype]))


def flatten_gradients(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Copy the gradients of `parameters` (one dtype, one device) into one flat tensor and make them views of it; a missing one is 0."""
    first = parameters[0]
    flat, start = torch.empty(sum(each.numel() for each in parameters), dtype=first.dtype, device=first.device), 0
    for each in parameters:
        view = flat.narrow(0, start, each.numel()).view(each.shape)
        if each.grad is None:
            view.zero_()
        else:
            view.copy_(each.grad)
        each.grad, start = view, start + each.numel()
    return flat


@contextmanager
def open_world(
    config: DistributedConfig, *, say: Callable[[str], None], processor: bool = False, reading_s: float = 0.0
) -> Iterator[World]:
    """Join the other processes if torchrun or `launch` started this one, else run alone; leave at the end.

    On rank 0 `say` gets one line for each setting that could not be followed. With `processor` accelerators are not used. The others
    may arrive `reading_s` seconds later than the limit, because each of them reads a checkpoint before. If an error ends the block, it is
    written for the launcher.
    Raises ConfigError (more processes than GPUs), MachineError (the others cannot be reached).
    """
    info = find_rank_info(os.environ)
    rank, size, local_rank, local_size = info.rank, info.size, info.local_rank, info.local_size
    folder = failures.launch_folder()
    with ExitStack() as stack:
        if folder is not None:
            done = threading.Event()
            stack.callback(done.set)
            failures.watch_launcher(done)
            stack.push(lambda kind, error, trace: _report_failure(error, rank, folder))
        report = say if rank == 0 else lambda _: None
        world = World(rank, size, local_rank, device_here(local_rank, size, local_size, processor=processor), local_size)
        _divide_threads(stack, local_size, alone=size == 1)
        backend = _backend(config, world.device, report)
        for name in leftovers(os.environ):
            report(f"{name} in the environment is ignored, because the other variables that a launcher sets are missing")
        if config.world_size not in ("auto", size) and info.joins:
            report(f"distributed.world_size is {config.world_size}, but {size} processes were started: using {size}")
        if size > 1:
            _joined.set()
            join_group(world, info, config, backend, reading_s=reading_s)
            stack.callback(dist.destroy_process_group)
            stack.push(lambda kind, error, trace: _leave_together(error, world))
        yield world


def _backend(config: DistributedConfig, device: torch.device, report: Callable[[str], None]) -> str:
    if config.backend == "nccl" and device.type != "cuda":
        report("distributed.backend nccl needs CUDA, which this machine does not have: using gloo")
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" and config.backend != "gloo" else "gloo"


def _divide_threads(stack: ExitStack, local_size: int, *, alone: bool) -> None:
    """Give each process of a machine its share of the cores, unless the user set OMP_NUM_THREADS.

    An outer torchrun sets OMP_NUM_THREADS=1 by itself, so that value is not the user's.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen and (alone or failures.launch_folder() is not None or chosen != "1"):
        return
    before = torch.get_num_threads()
    share = max(1, usable_cores() // local_size)
    torch.set_num_threads(min(before, share) if alone else share)
    stack.callback(torch.set_num_threads, before)


_CPP_LOCATION = re.compile(r"\[\S+:\d+\] ")
"""The C++ file and line in front of a message of torch."""


def _peer_lost(world: World, text: str) -> Problem:
    """The problem if a collective failed with the message `text`."""
    timed_out = "imed out" in text or "imeout" in text
    reason = "another process did not answer in time" if timed_out else "another process has left"
    hint = "--set distributed.timeout='30 min' if it was only slow" if timed_out else "llamahome train-resume latest"
    detail = _CPP_LOCATION.sub("", text.splitlines()[0]).split(". This is")[0][:200]
    missing = f": {', '.join(absent)} did not join" if (absent := world.rank_status.absent()) else ""
    message = f"process {world.rank} of {world.size} failed {world.rank_status.phase}: {reason}{missing} ({detail})"
    return Problem(code=failures.PEER_LOST, message=message, hint=hint)


def _leave_together(error: BaseException | None, world: World) -> None:
    """After an orderly stop wait until all processes have saved, because the launcher ends the others once the first one has left."""
    if isinstance(error, Stopped):
        failures.ignore_sigterm()
        world.barrier()


def _report_failure(error: BaseException | None, rank: int, folder: Path) -> None:
    """Write the error that ends this process for its launcher; if the launcher has died, remove its folder."""
    if failures.launcher_is_gone():
        shutil.rmtree(folder, ignore_errors=True)
    elif error is not None and not isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
        failures.write_failure(error, rank=rank, folder=folder)
        failures.mute_stderr()
