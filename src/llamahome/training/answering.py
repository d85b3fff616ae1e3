"""Answers of a model to many prompts, generated in batches.

Prompts are sorted by length and generated together as far as a budget of tokens allows, so memory is bounded; equal ones are answered
greedily once. Where memory runs out nevertheless, the batch is halved.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from llamahome.distributed.devices import is_out_of_memory
from llamahome.errors import OutOfMemory, Problem
from llamahome.model.generate import generate, positions_of
from llamahome.model.load import CausalLM
from llamahome.model.stream import stream_of
from llamahome.training.memory import free_cached_memory
from llamahome.units import show_seconds

T = TypeVar("T")
R = TypeVar("R")
BATCH_TOKENS = 16_384
"""Prompts with their padding and answers of a batch: 0.8 GB of keys and values for the starter in float32, 2 GB for 8 B weights in bf16."""
_BATCH_ROWS = 64
_SAY_EVERY = 10.0
"""Seconds between two lines of progress."""


def generate_answers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int | None = None,
    alone: bool = True,
    say: Callable[[str], None] = lambda line: None,
    ran_out: Callable[[int], None] = lambda prompts: None,
) -> list[list[int]]:
    """Greedy answers in the order of the prompts; `say` gets a line about every ten seconds.

    Batches hold at most `batch_tokens`, or else `batch_tokens_of` the model; one that does not fit into memory is halved, and `ran_out`
    gets its number of prompts. Raises OutOfMemory if a single prompt does not fit, or if this rank does not generate `alone`: others wait
    for it within the same passes.
    """
    answers: dict[tuple[int, ...], list[int]] = {}
    wanted = sorted({tuple(prompt) for prompt in prompts})
    budget = batch_tokens_of(model) if batch_tokens is None else batch_tokens
    waiting = in_batches(wanted, len, max_new_tokens, budget=budget, positions=positions_of(model))
    begun = said = time.monotonic()

    def answer(batch: list[tuple[int, ...]]) -> list[list[int]]:
        return generate(model, batch, end_ids=end_ids, max_new_tokens=max_new_tokens)

    for batch, generated in each_batch(waiting, answer, alone=alone, refusal=_refusal, ran_out=ran_out):
        answers.update(zip(batch, generated, strict=True))
        now = time.monotonic()
        if now - said > _SAY_EVERY and len(answers) < len(wanted):
            said, left = now, (now - begun) / len(answers) * (len(wanted) - len(answers))
            say(f"answers: {len(answers):,} of {len(wanted):,}, about {show_seconds(left)} left")
    return [answers[tuple(prompt)] for prompt in prompts]


def batch_tokens_of(model: CausalLM) -> int:
    """Most tokens of a batch: BATCH_TOKENS, or those for which a streamed base leaves memory."""
    stream = stream_of(model)
    return BATCH_TOKENS if stream is None else min(BATCH_TOKENS, stream.batch_tokens)


def in_batches(
    prompts: Iterable[T], length: Callable[[T], int], room: int, *, budget: int = BATCH_TOKENS, positions: int | None
) -> list[list[T]]:
    """Prompts of similar length together, equally long ones in their order; the longest last, for `each_batch` begins there.

    `length` gives the tokens of a prompt, `room` those of its answer, and `positions` how many tokens the model can see, if it has an end.
    """
    batches: list[list[T]] = []
    for prompt in sorted(prompts, key=length):
        tokens = length(prompt) + room
        alone = positions is not None and tokens > positions  # a shorter prompt beside it would lose positions by its padding
        if batches and not alone and len(batches[-1]) < _BATCH_ROWS and (len(batches[-1]) + 1) * tokens <= budget:
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches


def each_batch(
    waiting: list[list[T]],
    work: Callable[[list[T]], R],
    *,
    alone: bool,
    refusal: Callable[[list[T]], OutOfMemory],
    ran_out: Callable[[int], None] = lambda prompts: None,
) -> Iterator[tuple[list[T], R]]:
    """Every batch with the result of `work`, the last of `waiting` first, so that an estimate of the time falls.

    A batch that does not fit into memory is halved, and `ran_out` gets its number of prompts. Raises the `refusal` of a single prompt that
    does not fit, and of any batch if this rank does not work `alone`: others wait for it within the same passes.
    """
    while waiting:
        batch = waiting.pop()
        done: list[R] = []
        try:
            done.append(work(batch))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1 or not alone:
                raise refusal(batch) from error
        if done:
            yield batch, done[0]
        else:  # outside of the handler, because the error holds everything that the pass has kept
            ran_out(len(batch))
            free_cached_memory()
            waiting += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]


def _refusal(batch: list[tuple[int, ...]]) -> OutOfMemory:
    what = f"a prompt of {len(batch[0]):,} tokens and its answer" if len(batch) == 1 else f"{len(batch)} prompts and answers"
    message, hint = f"{what} do not fit into memory", "--max-new-tokens 64"
    return OutOfMemory(Problem(code="evaluation.out-of-memory", message=message, hint=hint))
