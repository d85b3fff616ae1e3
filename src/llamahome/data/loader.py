"""The step's micro-batches for this rank, laid out ahead of the loop by one background thread.

Invariant: which examples are in a step depends on (table, seed, position) alone; ranks, micro-batch size and interruptions change only how
they are laid out. The position is the number of examples consumed; it is all that a checkpoint needs. Memory: two steps ahead.

    with Loader(table, batch_size=32, ...) as loader:
        for microbatches in loader:      # one optimizer step, maybe empty on this rank
            ...
"""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType

import numpy as np
import torch

from llamahome.data.batching import divide
from llamahome.data.order import rows_at
from llamahome.data.records import Example, Microbatch
from llamahome.data.table import ExampleTable

_AHEAD = 2
"""Steps laid out before they are asked for."""


def total_positions(num_rows: int, *, epochs: float, batch_size: int, max_steps: int | None = None) -> int:
    """How many examples a run consumes. `max_steps` decides alone when it is given; otherwise the epochs, rounded up to a whole example."""
    if max_steps is not None:
        return max_steps * batch_size
    return max(1, math.ceil(round(epochs * num_rows, 6)))


def horizon(num_rows: int, *, epochs: float, batch_size: int, max_steps: int | None = None) -> int:
    """The planned number of steps; the last one may be smaller."""
    return -(-total_positions(num_rows, epochs=epochs, batch_size=batch_size, max_steps=max_steps) // batch_size)


def make_microbatch(examples: Sequence[Example], *, keys: Sequence[int], index: int, device: torch.device | str) -> Microbatch:
    """The examples end to end on `device`, in their order."""
    lengths = tuple(len(example.tokens) for example in examples)
    tokens = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    targets = np.flatnonzero(np.concatenate([example.targets for example in examples]))
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    return Microbatch(
        tokens_T=_move(tokens, device),
        positions_T=_move(positions, device),
        lengths=lengths,
        rows_N=_move(targets - 1, device),
        labels_N=_move(tokens[targets], device),
        keys=tuple(keys),
        index=index,
    )


def sequential_microbatches(
    table: ExampleTable, *, micro_batch_tokens: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
) -> list[Microbatch]:
    """The part of this rank of every example of the table, once; for evaluation."""
    return _lay_out(
        table,
        list(range(len(table))),
        list(range(len(table))),
        micro_batch_tokens=micro_batch_tokens,
        place=(rank, world_size),
        device=device,
    )


@dataclass
class Loader:
    """Iterates over steps; each item is the list of this rank's micro-batches. Close it, or use it as a context manager."""

    table: ExampleTable
    _: KW_ONLY
    batch_size: int
    micro_batch_tokens: int
    seed: int
    total_positions: int
    start_position: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    _yielded: tuple[int, int] = field(init=False)
    """Positions of the step last given out."""
    _planned: int = field(init=False)
    """Where the next step to lay out begins."""
    _pending: deque["Future[_Step]"] = field(init=False, default_factory=deque)
    _worker: ThreadPoolExecutor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not len(self.table):
            raise ValueError("a loader needs at least one example")
        self._yielded = (self.start_position, self.start_position)
        self._planned = self.start_position

    @property
    def position(self) -> int:
        """Examples consumed when the step last given out is done; a Loader with it as start_position goes on there."""
        return self._yielded[1]

    def set_micro_batch_tokens(self, micro_batch_tokens: int) -> None:
        """Lay out every step not yet given out with this budget; the examples in each step stay the same."""
        self.micro_batch_tokens = micro_batch_tokens

    def again(self) -> list[Microbatch]:
        """The step last given out, laid out with the present budget."""
        return self._build(*self._yielded, self.micro_batch_tokens).microbatches

    def close(self) -> None:
        """Stop working ahead and wait for the thread to end; may be called twice."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._worker = None
        self._pending.clear()
        self._planned = self._yielded[1]

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Microbatch]:
        self._work_ahead()
        failed = next((step for step in self._pending if step.done() and step.exception() is not None), None)
        if failed is not None or not self._pending:
            self.close()
            if failed is None:
                raise StopIteration
            failed.result()
        step = self._pending.popleft().result()
        self._work_ahead()
        self._yielded = (step.begin, step.end)
        return step.microbatches if step.micro_batch_tokens == self.micro_batch_tokens else self.again()

    def _work_ahead(self) -> None:
        while len(self._pending) < _AHEAD and self._planned < self.total_positions:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llamahome-loader")
            end = min(self._planned + self.batch_size, self.total_positions)
            self._pending.append(self._worker.submit(self._build, self._planned, end, self.micro_batch_tokens))
            self._planned = end

    def _build(self, begin: int, end: int, micro_batch_tokens: int) -> "_Step":
        positions = np.arange(begin, end, dtype=np.int64)
        rows = rows_at(positions, num_rows=len(self.table), seed=self.seed)
        place = (self.rank, self.world_size)
        laid = _lay_out(
            self.table, rows.tolist(), positions.tolist(), micro_batch_tokens=micro_batch_tokens, place=place, device=self.device
        )
        return _Step(begin, end, micro_batch_tokens, laid)


@dataclass(frozen=True)
class _Step:
    """One step laid out."""

    begin: int
    end: int
    micro_batch_tokens: int
    microbatches: list[Microbatch]


def _lay_out(
    table: ExampleTable,
    rows: Sequence[int],
    keys: Sequence[int],
    *,
    micro_batch_tokens: int,
    place: tuple[int, int],
    device: torch.device | str,
) -> list[Microbatch]:
    """Micro-batches of rank place[0] of place[1] for the rows of one step; numbered over all ranks."""
    rank, world_size = place
    ranks = divide([table.num_tokens(row) for row in rows], world_size=world_size, micro_batch_tokens=micro_batch_tokens)
    first = sum(len(packs) for packs in ranks[:rank])
    return [
        make_microbatch([table.example(rows[i]) for i in pack], keys=[keys[i] for i in pack], index=first + number, device=device)
        for number, pack in enumerate(ranks[rank])
    ]


def _move(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
