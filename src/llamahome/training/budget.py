"""The tokens per micro-batch of a run: fewer when memory runs out, and later more again."""

from collections.abc import Sequence

from llamahome.data.steps.loader import StepBatch
from llamahome.distributed.rank_status import processes
from llamahome.training.memory import RanOut, free_cached_memory, smaller_budget
from llamahome.training.run import Run


class Budget:
    """The tokens per micro-batch of a run: fewer on all ranks when memory runs out on one, and later more again, one try at a time.

    All ranks call the methods at the same steps. What is learned stays the same up to rounding.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._wanted = run, run.loader.micro_batch_tokens
        self._pause, self._next_try = run.settings.retry_memory_after, 0
        self._raised_at: int | None = None
        self.short: str | None = None
        """What the last update of this rank said when memory ran out in it, until the ranks agree on a smaller budget."""

    def lower(self, batch: StepBatch, ran_out: RanOut, *, step: int) -> StepBatch:
        """The examples of `batch`, whose step is done again, in smaller micro-batches, as in later steps. Raises OutOfMemory."""
        run, tokens = self._run, batch.micro_batch_tokens
        lengths = [microbatch.row_lengths for microbatch in batch.microbatches]
        waits, remedies = ran_out.others_wait, run.settings.remedies
        smaller = smaller_budget(ran_out.message, tokens, lengths, world=run.world, others_wait=waits, remedies=remedies)
        again = run.loader.lay_out_again(batch, smaller.micro_batch_tokens)
        self._tell(smaller.ranks, step=step, tokens=tokens, how="this step is done again with")
        return again

    def before_step(self, batch: StepBatch, *, step: int, short: bool) -> StepBatch:
        """`batch`, or its examples in larger micro-batches if that is worth a try again, or in smaller ones after an update was `short`."""
        run, tokens = self._run, self._run.loader.micro_batch_tokens
        if short:
            ranks = [rank for rank, was_short in enumerate(run.world.gather(self.short is not None)) if was_short]
            self.short = None
            again = run.loader.lay_out_again(batch, max(1, tokens // 2))
            self._tell(ranks, step=step - 1, tokens=tokens, how="the update was done again; micro-batches now have")
            return again
        if tokens >= self._wanted or step < self._next_try:
            return batch
        self._raised_at, self._next_try = step, step + self._pause
        larger = min(self._wanted, 2 * tokens)
        run.recorder.event("more-memory-tried", step=step, micro_batch_tokens=larger)
        run.progress.say(f"step {step}: up to {larger:,} tokens at a time again")
        return run.loader.lay_out_again(batch, larger)

    def _tell(self, ranks: Sequence[int], *, step: int, tokens: int, how: str) -> None:
        free_cached_memory()
        run, budget = self._run, self._run.loader.micro_batch_tokens
        failed_again = self._raised_at is not None and step - self._raised_at < self._pause
        self._pause = 2 * self._pause if failed_again else run.settings.retry_memory_after
        self._next_try = step + self._pause
        run.recorder.event("out-of-memory", step=step, micro_batch_tokens=budget, processes=list(ranks))
        on = f" on {processes(ranks)}" if run.world.size > 1 else ""
        message = f"step {step}: memory ran out{on} with up to {tokens:,} tokens at a time"
        then = f"{how} {budget:,}, and later steps use {budget:,}, too, for {self._pause} steps; the result stays the same"
        run.progress.warn(message, then)
