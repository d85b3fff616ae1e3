"""What a run does about trouble that is not the user's fault: steps that are not finite, and memory that runs out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamahome.distributed.devices import HostCopy
from llamahome.distributed.world import World
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
    _noted: list[tuple[int, tuple[int, int], Tensor]] = field(default_factory=list)
    _unread: list[tuple[list[tuple[int, tuple[int, int]]], HostCopy]] = field(default_factory=list)

    def note(self, step: int, positions: tuple[int, int], refused: Tensor) -> None:
        """Keep the flag of `step`, which consumed the positions from, to, for later."""
        self._noted.append((step, positions, refused))

    def cut(self) -> None:
        """Send the flags noted since the last cut on their way to the host; waits for nothing."""
        steps = [(step, positions) for step, positions, _ in self._noted]
        if steps:
            self._unread.append((steps, HostCopy([flag for _, _, flag in self._noted])))
        self._noted.clear()

    def read(self) -> dict[int, tuple[int, int]]:
        """The steps of the oldest cut not read yet whose updates were refused, and the positions of each. Waits for the device."""
        steps, flags = self._unread.pop(0) if self._unread else ([], None)
        bad = {}
        for (step, positions), flag in zip(steps, flags.read() if flags is not None else [], strict=True):
            self.in_row = self.in_row + 1 if flag else 0
            self.longest = max(self.longest, self.in_row)
            if flag:
                bad[step] = positions
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


_SIGNS = ("can't allocate memory", "not enough memory", "error: out of memory", "_STATUS_ALLOC_FAILED")
"""What torch's plain RuntimeErrors say: on Linux and macOS, on Windows, of a GPU whose memory others have, of its libraries."""


def exhausted(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def give_back_memory() -> None:
    """Give back what an accelerator's allocator keeps for blocks of the sizes that did not fit; done before a step is done again."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@dataclass(frozen=True)
class Smaller:
    """With what a step is done again."""

    micro_batch_tokens: int
    ran_out: list[int]
    """Processes whose memory ran out."""


def smaller_budget(
    told: str | None, micro_batch_tokens: int, lengths: Sequence[Sequence[int]], *, world: World, others_wait: bool = False
) -> Smaller:
    """Agree on the tokens per micro-batch with which all processes do a step again; `lengths` are those of this one's documents.

    `told` is what this process was told when its memory ran out, None when it was another's. The new budget is half of the largest
    micro-batch that holds more than one document, and fits all. Called by all processes, unless `others_wait` in a pass for this one:
    then nothing can be done again. Raises OutOfMemory, which names the process, on all that called.
    """
    mine: dict[str, Any] = {}
    if told is not None:
        halves = [sum(documents) // 2 for documents in lengths if len(documents) > 1]
        budget = max(1, min(micro_batch_tokens // 2, max(halves, default=0)))
        if halves:
            mine["budget"] = budget
        if others_wait or not halves:
            mine["problem"] = asdict(_does_not_fit(told, micro_batch_tokens, lengths, smaller=mine.get("budget"), world=world))
    answers = [mine] if others_wait else world.gather(mine)
    problems = [answer["problem"] for answer in answers if "problem" in answer]
    if problems:
        raise OutOfMemory(Problem(**problems[0]))
    return Smaller(min(answer["budget"] for answer in answers if answer), [rank for rank, answer in enumerate(answers) if answer])


def _does_not_fit(told: str, micro_batch_tokens: int, lengths: Sequence[Sequence[int]], *, smaller: int | None, world: World) -> Problem:
    longest = max((max(documents, default=0) for documents in lengths), default=0)
    tried = f"a micro-batch of up to {micro_batch_tokens:,} tokens" if smaller else f"a single example of {longest:,} tokens"
    setting = f"training.micro_batch_tokens={smaller}" if smaller else f"data.max_length={max(16, longest // 2)}"
    where = f" into the memory of process {world.rank}" if world.size > 1 else ""
    return Problem(
        code="training.out-of-memory",
        message=f"{tried} does not fit{where}: {told.splitlines()[0][:160]}",
        where=setting.split("=")[0],
        hint=f"--set training.gradient_checkpointing=true (the result stays the same), or --set {setting}",
    )


def update_does_not_fit(error: BaseException, *, world: World) -> OutOfMemory:
    """What to raise when memory runs out after the passes, while gradients are exchanged or weights updated: smaller passes are no help."""
    told = (str(error).splitlines() or ["no more memory"])[0]
    where = f" of process {world.rank}" if world.size > 1 else ""
    message = f"gradients and optimizer do not fit into the memory{where} beside the weights: {told[:160]}"
    hint = f"--method lora (or a smaller lora.rank), or --world-size {2 * world.size} --set distributed.strategy=shard"
    return OutOfMemory(Problem(code="training.out-of-memory", message=message, where="training.method", hint=hint))
