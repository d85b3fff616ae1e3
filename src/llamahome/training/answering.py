"""Greedy answers of a model to many prompts, generated in batches.

Prompts are sorted by length and generated together as far as a budget of tokens allows, so memory is bounded; equal ones are answered
once. Where memory runs out nevertheless, the batch is halved.
"""

import time
from collections.abc import Callable, Sequence

from llamahome.distributed.devices import is_out_of_memory
from llamahome.errors import OutOfMemory, Problem
from llamahome.model.generate import generate, positions_of
from llamahome.model.load import CausalLM
from llamahome.training.memory import free_cached_memory
from llamahome.units import show_seconds

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
    batch_tokens: int = BATCH_TOKENS,
    alone: bool = True,
    say: Callable[[str], None] = lambda line: None,
    ran_out: Callable[[int], None] = lambda prompts: None,
) -> list[list[int]]:
    """Greedy answers in the order of the prompts; `say` gets a line about every ten seconds.

    Batches hold at most `batch_tokens`; one that does not fit into memory is halved, and `ran_out` gets its number of prompts. Raises
    OutOfMemory if a single prompt does not fit, or if this rank does not generate `alone`: others wait for it within the same passes.
    """
    answers: dict[tuple[int, ...], list[int]] = {}
    waiting = _batches({tuple(prompt) for prompt in prompts}, max_new_tokens, batch_tokens, positions_of(model))
    total, begun, said = sum(map(len, waiting)), time.monotonic(), time.monotonic()
    while waiting:
        batch = waiting.pop()
        try:
            generated: list[list[int]] | None = generate(model, batch, end_ids=end_ids, max_new_tokens=max_new_tokens)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1 or not alone:
                prompts_of = (
                    f"a prompt of {len(batch[0]):,} tokens and its answer" if len(batch) == 1 else f"{len(batch)} prompts and answers"
                )
                message, hint = f"{prompts_of} do not fit into memory", "--max-new-tokens 64"
                raise OutOfMemory(Problem(code="evaluation.out-of-memory", message=message, hint=hint)) from error
            generated = None
        if generated is None:  # outside of the handler, because the error holds everything that the pass has kept
            ran_out(len(batch))
            free_cached_memory()
            waiting += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            continue
        answers.update(zip(batch, generated, strict=True))
        now = time.monotonic()
        if now - said > _SAY_EVERY and waiting:
            said, left = now, (now - begun) / len(answers) * (total - len(answers))
            say(f"answers: {len(answers):,} of {total:,}, about {show_seconds(left)} left")
    return [answers[tuple(prompt)] for prompt in prompts]


def _batches(prompts: set[tuple[int, ...]], room: int, budget: int, positions: int | None) -> list[list[tuple[int, ...]]]:
    """Prompts of similar length together, the longest last, so that they are generated first and the estimate of time falls."""
    batches: list[list[tuple[int, ...]]] = []
    for prompt in sorted(prompts, key=lambda each: (len(each), each)):
        alone = positions is not None and len(prompt) + room > positions  # a shorter prompt beside it would lose positions by its padding
        fits = batches and len(batches[-1]) < _BATCH_ROWS and (len(batches[-1]) + 1) * (len(prompt) + room) <= budget
        if fits and not alone:
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches
