"""What a run does about trouble that is not the user's fault: steps that are not finite, and memory that runs out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamahome.errors import Diverged, OutOfMemory, Problem


@dataclass
class BadSteps:
    """Counts refused updates without reading the device in every step: flags are kept and read at the next flush."""

    most_in_row: int
    total: int
    """Over the whole run."""
    in_row: int = 0
    longest: int = 0
    """The most in a row so far: good steps may follow before anybody reads."""
    _unread: list[tuple[int, tuple[int, int], Tensor]] = field(default_factory=list)

    def note(self, step: int, positions: tuple[int, int], refused: Tensor) -> None:
        """Keep the flag of `step`, which consumed the positions from, to, for later."""
        self._unread.append((step, positions, refused))

    def read(self) -> dict[int, tuple[int, int]]:
        """The steps since the last reading whose updates were refused, and the positions of each. Waits for the device."""
        if not self._unread:
            return {}
        flags = torch.stack([flag for _, _, flag in self._unread]).tolist()
        bad = {}
        for (step, positions, _), flag in zip(self._unread, flags, strict=True):
            self.in_row = self.in_row + 1 if flag else 0
            self.longest = max(self.longest, self.in_row)
            if flag:
                bad[step] = positions
        self._unread.clear()
        self.total += len(bad)
        return bad

    def raise_if_diverged(self, rows: Sequence[str], go_on: str) -> None:
        """Diverged after `most_in_row` refused updates in a row; `go_on` is what to type then."""
        if self.longest >= self.most_in_row:
            raise Diverged(
                Problem(
                    code="training.diverged",
                    message=f"loss or gradient was not finite in {self.longest} steps in a row; no such update was applied; "
                    f"rows of the last one: {', '.join(rows[:8])}",
                    where="training.max_bad_steps",
                    hint=f"{go_on}   (and look at those rows)",
                )
            )


def smaller_budget(error: BaseException, micro_batch_tokens: int, lengths: Sequence[Sequence[int]], *, alone: bool) -> int:
    """Tokens per micro-batch with which to do a step again when memory ran out; `lengths` are those of its micro-batches' documents.

    Half of the largest that holds more than one document. Raises `error` when it is something else, OutOfMemory when nothing can be
    halved or this process is not `alone`: what stands between passes is then not only its own.
    """
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if not exhausted:
        raise error
    halves = [sum(documents) // 2 for documents in lengths if len(documents) > 1]
    budget = max(1, min(micro_batch_tokens // 2, max(halves, default=0)))
    if halves and alone:
        return budget
    longest = max((max(documents, default=0) for documents in lengths), default=0)
    tried = f"a micro-batch of up to {micro_batch_tokens:,} tokens" if halves else f"a single example of {longest:,} tokens"
    smaller = f"training.micro_batch_tokens={budget}" if halves else f"data.max_length={max(16, longest // 2)}"
    told = str(error).splitlines() or ["no more memory"]  # Python's own says nothing
    raise OutOfMemory(
        Problem(
            code="training.out-of-memory",
            message=f"{tried} does not fit: {told[0][:160]}",
            where=smaller.split("=")[0],
            hint=f"--set training.gradient_checkpointing=true (the result stays the same), or --set {smaller}",
        )
    ) from error
