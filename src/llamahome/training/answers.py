"""The questions in the rows of a file, and the loss of every row.

A question is the conversation of a row up to its last assistant turn, in the tokens that training uses; that turn is the reference.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llamahome.data.records import Microbatch, Row
from llamahome.data.rows.formats import understand
from llamahome.data.store.row_reader import RowReader
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.targets import Tokenized, tokenize
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.objective import Objective
from llamahome.training.evaluate import Evaluation
from llamahome.units import many

_TOKENIZED_TOGETHER = 128


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
    return Question(number, tuple(tokens[:start]), tokenizer.decode(tokens[:start]), tokenizer.decode(reference).strip())


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
