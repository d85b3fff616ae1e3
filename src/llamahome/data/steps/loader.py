"""The step's micro-batches for this rank, laid out ahead of the loop by background threads.

Invariant: which examples are in a step depends on (data, seed, position) alone; ranks, micro-batch size and interruptions change only how
they are laid out. A position is one row of the order: it gives one example, several (a text that was split) or none. The position is all
that a checkpoint needs. Memory: a few steps ahead.

    with Loader(examples, order, batch_size=32, ...) as loader:
        for batch in loader:      # one optimizer step: batch.microbatches, maybe none on this rank
            ...
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from types import TracebackType
from typing import Protocol

import numpy as np

from llamahome.data.records import Microbatch, Together
from llamahome.data.steps.batching import divide
from llamahome.data.steps.layout import EACH_ALONE, Layout, idle_microbatch, make_microbatch, undivided
from llamahome.data.steps.mixture import RowOrder
from llamahome.data.store.counts import Counts
from llamahome.data.store.streaming import StreamedExamples
from llamahome.data.store.table import ExampleTable

_AHEAD = 2
"""Steps laid out before they are asked for, besides one for each thread more than one."""


Examples = ExampleTable | StreamedExamples
"""Where examples come from: a prepared table, or a stream that makes them."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How far a run goes; `step` updates over `consumed` rows are done, perhaps with another batch size than the rest."""

    epochs: float
    batch_size: int
    max_steps: int | None = None
    """Decides alone when it is given."""
    step: int = 0
    consumed: int = 0

    def positions(self, num_rows: int) -> int:
        """Rows that the whole run consumes when an epoch has `num_rows`; epochs are rounded up to a whole row."""
        if self.max_steps is not None:
            return self.consumed + max(0, self.max_steps - self.step) * self.batch_size
        return max(1, self.consumed, math.ceil(round(self.epochs * num_rows, 6)))

    def horizon(self, num_rows: int) -> int:
        """The planned number of steps; the last one may be smaller."""
        return self.step + -(-(self.positions(num_rows) - self.consumed) // self.batch_size)


Deliver = Callable[[Microbatch], Microbatch]
"""Takes a micro-batch to the device, on the loader's thread."""


def stay(batch: Microbatch) -> Microbatch:
    """The micro-batch as it was laid out, in the machine's memory."""
    return batch


def sequential_microbatches(
    table: ExampleTable,
    *,
    micro_batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    equal_passes: bool = False,
    deliver: Deliver = stay,
    layout: Layout = EACH_ALONE,
) -> list[Microbatch]:
    """The part of this rank of every example of the table, once; for evaluation."""
    place = Place(rank, world_size, equal_passes, layout)
    return lay_out(table, range(len(table)), micro_batch_tokens=micro_batch_tokens, place=place, deliver=deliver)


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: the positions it consumes and this rank's share of their examples."""

    begin: int
    """First position of the step."""
    end: int
    """Position after the last one of the step; a run that goes on continues there."""
    microbatches: list[Microbatch]
    micro_batch_tokens: int
    """The budget with which the micro-batches were laid out."""
    counts: Counts
    """What became of the rows of the step, over all ranks."""
    table: ExampleTable | None = None
    """The examples of the step, over all ranks, of a loader that does not lay them out."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank."""
        return sum(microbatch.num_tokens for microbatch in self.microbatches)

    @property
    def num_targets(self) -> int:
        """Targets of this rank."""
        return sum(microbatch.num_targets for microbatch in self.microbatches)


class Steps(Protocol):
    """The steps of a run, as the loop reads them: a Loader, or a stage behind it that makes other micro-batches of its rows."""

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens of a micro-batch from now on."""

    @property
    def seen(self) -> Counts:
        """What became of the rows of the steps given out, over all ranks."""

    @property
    def row_names(self) -> Callable[[Sequence[int]], list[str]]:
        """Names of rows of the source, for messages."""

    def __next__(self) -> StepBatch:
        """The next step; all ranks ask for it."""

    def lay_out_again(self, batch: StepBatch, micro_batch_tokens: int) -> StepBatch:
        """The same examples with another budget, which holds for every later step, too."""

    def rows_of(self, begin: int, end: int) -> list[int]:
        """The rows of the source at positions from `begin` to before `end`."""

    def close(self) -> None:
        """Stop working ahead."""


@dataclass
class Loader:
    """Iterates over the steps of a run; each item is one StepBatch. Close it, or use it as a context manager."""

    examples: Examples
    order: RowOrder
    _: KW_ONLY
    batch_size: int
    """Rows of a step, over all ranks."""
    micro_batch_tokens: int
    seed: int
    total_positions: int
    start_position: int = 0
    rank: int = 0
    world_size: int = 1
    equal_passes: bool = False
    """Whether every rank gets as many micro-batches as the others, of which some may be idle."""
    deliver: Deliver = stay
    layout: Layout = EACH_ALONE
    lays_out: bool = True
    """False: a step has its examples in `table` and no micro-batches, for a stage that makes others of them."""
    judge: Callable[[Counts], None] | None = None
    """Called with `seen` after each step of the first epoch; may raise DataError when too many rows were bad."""
    row_names: Callable[[Sequence[int]], list[str]] = lambda rows: []
    """Names of rows of the source, for messages."""
    seen: Counts = field(init=False, default_factory=Counts)
    """What became of the rows of the steps given out, over all ranks, since this loader began."""
    _position: int = field(init=False)
    """End of the step last given out."""
    _planned: int = field(init=False)
    """Where the next step to lay out begins."""
    _pending: deque["Future[StepBatch]"] = field(init=False, default_factory=deque)
    _pool: ThreadPoolExecutor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.order.epoch_rows < 1:
            raise ValueError("a loader needs at least one row")
        self._position = self._planned = self.start_position

    def lay_out_again(self, batch: StepBatch, micro_batch_tokens: int) -> StepBatch:
        """The same examples with another budget, which holds for every later step, too."""
        self.micro_batch_tokens = micro_batch_tokens
        return self._build(batch.begin, batch.end, micro_batch_tokens)

    def rows_of(self, begin: int, end: int) -> list[int]:
        """The rows of the source at positions from `begin` to before `end`."""
        numbers: list[int] = self.order.rows_at(np.arange(begin, end, dtype=np.int64), seed=self.seed).tolist()
        return numbers

    def close(self) -> None:
        """Stop working ahead and wait for the threads to end; may be called twice."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        self._pending.clear()
        self._planned = self._position

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> StepBatch:
        self._work_ahead()
        if not self._pending:
            self.close()
            raise StopIteration
        failed = next((step for step in self._pending if step.done() and step.exception() is not None), None)
        try:
            step = (failed or self._pending.popleft()).result()
        except BaseException:
            self.close()
            raise
        self._work_ahead()
        self._position = step.end
        self.seen.add(step.counts)
        if self.judge is not None and step.begin < self.order.epoch_rows:
            self.judge(self.seen)
        if step.micro_batch_tokens != self.micro_batch_tokens:
            if not self.lays_out:
                return replace(step, micro_batch_tokens=self.micro_batch_tokens)
            return self._build(step.begin, step.end, self.micro_batch_tokens)
        return step

    def _work_ahead(self) -> None:
        threads = self.examples.threads
        while len(self._pending) < _AHEAD + threads - 1 and self._planned < self.total_positions:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="llamahome-loader")
            end = min(self._planned + self.batch_size, self.total_positions)
            self._pending.append(self._pool.submit(self._build, self._planned, end, self.micro_batch_tokens))
            self._planned = end

    def _build(self, begin: int, end: int, micro_batch_tokens: int) -> StepBatch:
        rows = self.order.rows_at(np.arange(begin, end, dtype=np.int64), seed=self.seed)
        table, counts = self.examples.examples_of(rows), Counts()
        counts.count_table(table)
        if not self.lays_out:
            return StepBatch(begin, end, [], micro_batch_tokens, counts, table)
        place = Place(self.rank, self.world_size, self.equal_passes, self.layout)
        keys = (table.row_of + begin).tolist()
        laid = lay_out(table, keys, micro_batch_tokens=micro_batch_tokens, place=place, deliver=self.deliver)
        return StepBatch(begin, end, laid, micro_batch_tokens, counts)


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, whether all have to run equally often, and how rows lie in their passes."""

    rank: int
    world_size: int
    equal_passes: bool
    layout: Layout = EACH_ALONE


def lay_out(table: ExampleTable, keys: Sequence[int], *, micro_batch_tokens: int, place: Place, deliver: Deliver) -> list[Microbatch]:
    """Micro-batches of one rank for every example of the table; numbered over all ranks, idle ones behind all others."""
    rows, shared, lengths = undivided(table, place.layout)
    ranks = divide(lengths, world_size=place.world_size, micro_batch_tokens=micro_batch_tokens)
    first, mine = sum(len(packs) for packs in ranks[: place.rank]), ranks[place.rank]
    made = []
    for number, pack in enumerate(mine):
        groups = [Together(len(rows[unit]), shared[unit]) for unit in pack] if place.layout.whole_rows else ()
        numbers = [i for unit in pack for i in rows[unit]]
        examples, named = [table.example(i) for i in numbers], [keys[i] for i in numbers]
        made.append(deliver(make_microbatch(examples, keys=named, index=first + number, groups=groups)))
    if place.equal_passes:
        behind, most = sum(len(packs) for packs in ranks), max(len(packs) for packs in ranks)
        made += [deliver(idle_microbatch(index=behind))] * (most - len(mine))
    return made
