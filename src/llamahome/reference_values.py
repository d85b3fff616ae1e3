"""The log-probabilities of answers in the reference, the model before the first update: computed once and kept in a file.

The file's name says which examples and which weights it is about, so a later run over the same data reads it, and so does a resumed run,
whose weights are no longer those of the reference. Values that were never needed are NaN; they are added when a longer run needs them.
Cost: one forward pass over each answer. Memory and disk: 4 bytes for each answer.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamahome.assembly import Job
from llamahome.config.preference import WITH_REFERENCE
from llamahome.data.records import Microbatch
from llamahome.data.steps.layout import Layout
from llamahome.data.steps.loader import Deliver, sequential_microbatches
from llamahome.data.store.table import ExampleTable
from llamahome.distributed.devices import is_out_of_memory
from llamahome.distributed.world import World
from llamahome.durable import write_whole
from llamahome.errors import CheckpointError, Problem
from llamahome.model.fingerprints import fingerprint
from llamahome.model.objective import Objective
from llamahome.model.shard import Placement
from llamahome.progress_marks import marks
from llamahome.resolve import selected_rows
from llamahome.rundir import PROCESSED_DATA
from llamahome.training.memory import free_cached_memory, smaller_budget
from llamahome.training.preferences import answer_logprobs
from llamahome.units import many, show_seconds

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """Computes the values with the weights as they are now."""

    supervised: Objective
    placement: Placement
    layout: Layout
    micro_batch_tokens: int
    deliver: Deliver
    start: str
    """Fingerprint of the weights before the first update."""
    is_start: bool
    """Whether the weights are those of before the first update; not where a run that began with an adapter is resumed."""
    folder: Path
    say: Say

    @property
    def world(self) -> World:
        """All ranks compute a share."""
        return self.placement.exchange.world

    def known(self, table: ExampleTable, rows: NDArray[np.int64], what: str) -> ExampleTable:
        """`table` with the log-probability of every example of `rows`; all ranks call it.

        Raises CheckpointError where a value is missing and the weights have changed since.
        """
        path = self.folder / f"{_content_of(table)}-{self.start}.f32"
        values = self._read(path, len(table))
        wanted = np.zeros(table.num_rows, np.bool_)
        wanted[rows] = True
        missing = wanted[table.row_of] & np.isnan(values)
        if not missing.any():
            self.say(f"reference: the log-probabilities of {many(len(table), f'{what} answer')} are those of an earlier run ({path})")
            return replace(table, known=values)
        if not self.is_start:
            message = f"log-probabilities of the reference are missing for {many(int(missing.sum()), 'answer')}, and the run began with"
            hint = "begin a new run with --from-adapter"
            raise CheckpointError(Problem(code="training.reference-lost", message=f"{message} an adapter", where=str(path), hint=hint))
        numbers, started = np.unique(table.row_of[missing]), time.monotonic()
        values[np.isin(table.row_of, numbers)] = self._computed(table.examples_of(numbers))
        self._write(path, values)
        seconds = show_seconds(time.monotonic() - started)
        self.say(f"reference: log-probabilities of {many(int(missing.sum()), f'{what} answer')} computed in {seconds}, kept in {path}")
        return replace(table, known=values)

    def _computed(self, table: ExampleTable) -> NDArray[np.float32]:
        """The value of every example of `table`, in its order."""
        model, budget = self.supervised.model, self.micro_batch_tokens
        was_training = model.training
        model.eval()
        try:
            while True:
                batches = self._lay_out(table, budget)
                found, message = self._share(batches, len(table))
                gave_up = torch.tensor([float(message is not None)], dtype=torch.float64)
                self.world.sum_(gave_up)
                if not float(gave_up):
                    self.world.sum_(found)
                    return found.numpy().astype(np.float32)
                lengths = [batch.row_lengths for batch in batches]
                budget = smaller_budget(message, budget, lengths, world=self.world).micro_batch_tokens
                free_cached_memory()
        finally:
            model.train(was_training)

    def _lay_out(self, table: ExampleTable, budget: int) -> list[Microbatch]:
        return sequential_microbatches(
            table,
            micro_batch_tokens=budget,
            rank=self.world.rank,
            world_size=self.world.size,
            equal_passes=self.placement.equal_passes,
            deliver=self.deliver,
            layout=self.layout,
        )

    @torch.no_grad()
    def _share(self, batches: Sequence[Microbatch], count: int) -> tuple[Tensor, str | None]:
        """[count] float64 with the values of this rank's examples and zeros elsewhere; or how memory ran out."""
        values, message = [torch.zeros(0)], None
        numbers: list[int] = []
        try:
            for batch in batches:
                each = self.supervised.loss_of(batch, partial(answer_logprobs, batch=batch))
                marks.advance()
                if not batch.idle:
                    values.append(each.float())
                    numbers += batch.keys
            filled = torch.cat([value.cpu() for value in values]).double()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message, filled = str(error) or "no more memory", torch.zeros(0, dtype=torch.float64)
        ran_out = self.placement.exchange.guard.take() or message
        found = torch.zeros(count, dtype=torch.float64)
        if ran_out is None:
            found[torch.tensor(numbers, dtype=torch.int64)] = filled
        return found, ran_out

    def _read(self, path: Path, count: int) -> NDArray[np.float32]:
        """The values of the file of rank 0, on all ranks; NaN where there is none."""
        values = torch.full((count,), float("nan"), dtype=torch.float64)
        if self.world.is_main and path.is_file():
            stored = np.frombuffer(path.read_bytes(), "<f4")
            if len(stored) == count:
                values = torch.from_numpy(stored.astype(np.float64))
        shared = values if self.world.is_main else torch.zeros_like(values)
        self.world.sum_(shared)
        return shared.numpy().astype(np.float32)

    def _write(self, path: Path, values: NDArray[np.float32]) -> None:
        if not self.world.is_main:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, values.astype("<f4").tobytes())
        except OSError as error:
            self.say(f"{path} cannot be written: {error.strerror}; a resumed run computes these values again")


def weights_fingerprint(base: str, adapter: Path | None, precision: str) -> str:
    """Names the weights before the first update: the base, the files of an adapter that is trained further, and the precision."""
    begun = "" if adapter is None else fingerprint(adapter)
    return hashlib.sha256(f"{base} {precision} {begun}".encode()).hexdigest()[:16]


def _content_of(table: ExampleTable) -> str:
    digest = hashlib.sha256()
    for column in (table.offsets, table.tokens, table.targets):
        for begin in range(0, len(column), 1 << 22):
            digest.update(np.ascontiguousarray(column[begin : begin + (1 << 22)]).tobytes())
    return digest.hexdigest()[:16]


def with_reference(job: Job, start: str | None = None) -> Job:
    """The job with the log-probabilities of the reference beside its examples, if its objective has a reference.

    To be called before the weights of a checkpoint are restored. All ranks call it. `start` is Job.reference of the run that is resumed.
    """
    if job.config.training.objective not in WITH_REFERENCE:
        return job
    prepared, config, plan, learner, data = job.data.prepared, job.config, job.plan, job.learner, job.data
    if not isinstance(prepared.examples, ExampleTable):
        raise TypeError("the rows of an objective with a reference are stored, not streamed")
    precision = f"{data.backend.name} {data.backend.precision.name} {config.training.method}"
    resumed = start is not None
    start = start or weights_fingerprint(learner.base_fingerprint, data.adapter, precision)
    reference = Reference(
        Objective(learner.model, data.backend, learner.placement.within),
        learner.placement,
        job.layout,
        int(config.training.micro_batch_tokens),
        data.backend.to_device,
        start,
        is_start=not (resumed and data.adapter is not None),
        folder=PROCESSED_DATA / "reference",
        say=job.session.progress.say,
    )
    rows, slack = prepared.order.epoch_rows, config.training.max_bad_steps * (1 + config.training.max_rollbacks)
    positions = min(rows, plan.positions + slack * int(config.training.batch_size))  # a run that goes back passes over some rows
    order = np.unique(prepared.order.rows_at(np.arange(positions), seed=config.training.seed))
    examples = reference.known(prepared.examples, order, "training")
    evaluation = prepared.evaluation
    if evaluation is not None:
        evaluation = reference.known(evaluation, selected_rows(prepared, config), "held-out")
    known = replace(prepared, examples=examples, evaluation=evaluation)
    return replace(job, data=replace(data, prepared=known), reference=start)
