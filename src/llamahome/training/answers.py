"""Answers of a model to the rows of a file, generated in batches, and the loss of every row.

A question is the conversation of a row up to its last assistant turn, in the tokens that training uses; that turn is the reference.
Questions are sorted by length and generated together as far as a budget of tokens allows, so memory is bounded; equal ones are
answered once.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from llamahome.data.records import Microbatch, Row
from llamahome.data.rows.formats import understand
from llamahome.data.store.row_reader import RowReader
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.targets import Tokenized, tokenize
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.world import World
from llamahome.errors import OutOfMemory, Problem
from llamahome.model.generate import generate, positions_of
from llamahome.model.load import CausalLM
from llamahome.model.objective import Objective
from llamahome.training.evaluate import Evaluation
from llamahome.units import many, show_seconds

BATCH_TOKENS = 16_384
"""Prompts with their padding and answers of a batch: 0.8 GB of keys and values for the starter in float32, 2 GB for 8 B weights in bf16."""
_BATCH_ROWS = 64
_TOKENIZED_TOGETHER = 128
_SAY_EVERY = 10.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Question:
    """The conversation of a row before its last assistant turn."""

    row: int
    """The number of the row in the source."""
    tokens: tuple[int, ...]
    prompt: str
    """As the model sees it, with control tokens."""
    reference: str
    """The assistant turn of the row, without white space at its ends and without its end token."""
    reference_tokens: int


@dataclass(frozen=True)
class Questions:
    """The questions of some rows, and how many rows have none."""

    asked: tuple[Question, ...]
    without_answer: int
    """Rows without an assistant turn that is learned: plain texts, for example."""
    too_long: int
    """Rows whose prompt alone is longer than data.max_length."""

    def lines(self) -> list[str]:
        """What the user should know about rows that are not answered."""
        lines = []
        if self.without_answer:
            lines.append(f"{many(self.without_answer, 'row')} have no answer of the assistant, so nothing is generated for them")
        if self.too_long:
            lines.append(f"{many(self.too_long, 'row')} have a prompt longer than data.max_length, so nothing is generated for them")
        return lines


def read_questions(reading: RowReader, numbers: Iterable[int]) -> Questions:
    """The questions of these rows of the source, with the reader's tokenizer. Rows that training could not read have none."""
    asked: list[Question] = []
    without = too_long = 0
    numbers = list(numbers)
    for begin in range(0, len(numbers), _TOKENIZED_TOGETHER):
        together = numbers[begin : begin + _TOKENIZED_TOGETHER]
        conversations = {}
        for number in together:
            row = reading.source.parsed(number)
            conversation = understand(row, reading.format_name, reading.data.columns) if isinstance(row, Row) else row
            if isinstance(conversation, Problem) or conversation.text is not None:
                continue
            turns = enumerate(conversation.turns)
            if any(turn["role"] == "assistant" and place not in conversation.context_only for place, turn in turns):
                conversations[number] = conversation
        tokenized = dict(zip(conversations, tokenize(list(conversations.values()), reading.tokenizer, train_on="last"), strict=True))
        for number in together:
            question = _question(number, tokenized.get(number), reading.tokenizer)
            if question is None:
                without += 1
            elif len(question.tokens) > reading.data.max_length:
                too_long += 1
            else:
                asked.append(question)
    return Questions(tuple(asked), without, too_long)


def _question(number: int, tokenized: Tokenized | Problem | None, tokenizer: ChatTokenizer) -> Question | None:
    """The question of a row; None if no turn of it is a target."""
    if not isinstance(tokenized, Tokenized) or not tokenized.targets.any():
        return None
    start, end = last_span(tokenized.targets.tolist())
    tokens = tokenized.tokens.tolist()
    if start < 1:
        return None
    reference = without_end(tokens[start:end], tokenizer.all_ends)
    return Question(number, tuple(tokens[:start]), tokenizer.decode(tokens[:start]), tokenizer.decode(reference).strip(), len(reference))


def last_span(targets: Sequence[bool]) -> tuple[int, int]:
    """Begin and end of the last run of targets, of which there is at least one."""
    end = len(targets)
    while not targets[end - 1]:
        end -= 1
    start = end
    while start and targets[start - 1]:
        start -= 1
    return start, end


def without_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the end tokens with which they close."""
    kept = list(ids)
    while kept and kept[-1] in ends:
        kept.pop()
    return kept


def generate_answers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[int]]:
    """Greedy answers in the order of the prompts; `say` gets a line about every ten seconds.

    Batches hold at most `batch_tokens`; one that does not fit into memory is halved. Raises OutOfMemory if a single prompt does not fit.
    """
    answers: dict[tuple[int, ...], list[int]] = {}
    waiting = _batches({tuple(prompt) for prompt in prompts}, max_new_tokens, batch_tokens, positions_of(model))
    total, begun, said = sum(map(len, waiting)), time.monotonic(), time.monotonic()
    while waiting:
        batch = waiting.pop()
        try:
            generated = generate(model, batch, end_ids=end_ids, max_new_tokens=max_new_tokens)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                message = f"a prompt of {len(batch[0]):,} tokens and its answer do not fit into memory"
                hint = "--max-new-tokens 64"
                raise OutOfMemory(Problem(code="evaluation.out-of-memory", message=message, hint=hint)) from error
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


@dataclass(frozen=True)
class RowLoss:
    """Sums over the targets of a row."""

    loss: float
    correct: float
    targets: int


@torch.no_grad()
def row_losses(objective: Objective, batches: Sequence[Microbatch], table: ExampleTable, *, world: World) -> dict[int, RowLoss]:
    """Loss and correct targets of each row of `table` that has targets, by its number.

    `batches` are this rank's share of the table; all ranks call it.
    """
    objective.model.eval()
    targets = [int(table.example(number).targets.sum()) for number in range(len(table))]
    found = [torch.zeros(0, 2, device=world.device)]
    keys: list[int] = []
    for batch in batches:
        each = objective.stats_each(batch, [targets[key] for key in batch.keys])
        found.append(torch.stack([torch.stack([stats.loss_sum.float(), stats.correct.float()]) for stats in each]))
        keys += batch.keys
    sums = torch.zeros(len(table), 2, dtype=torch.float64)
    sums[torch.tensor(keys, dtype=torch.int64)] = torch.cat(found).cpu().double()
    world.sum_(sums)
    rows: dict[int, RowLoss] = {}
    for row, (loss, correct), count in zip(table.row_of.tolist(), sums.tolist(), targets, strict=True):
        before = rows.get(row, RowLoss(0.0, 0.0, 0))
        rows[row] = RowLoss(before.loss + loss, before.correct + correct, before.targets + count)
    return rows


def evaluation_of(rows: dict[int, RowLoss]) -> Evaluation:
    """The mean over all targets of all rows."""
    targets = sum(row.targets for row in rows.values())
    loss, correct = sum(row.loss for row in rows.values()), sum(row.correct for row in rows.values())
    return Evaluation(loss / max(1, targets), correct / max(1, targets), targets)
