"""Rows of a source to examples, with what became of each: the one way in which store, stream and every process read rows.

Memory: one batch of text, at most `_BATCH_CHARACTERS` and one row, besides the examples.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import Source
from llamahome.data.records import Conversation
from llamahome.data.rows.formats import understand
from llamahome.data.store.counts import Counts
from llamahome.data.store.table import ExampleTable, RowRead, build_table
from llamahome.data.text.targets import Encoded, encode
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import Problem

_BATCH_ROWS, _BATCH_CHARACTERS = 128, 1 << 20
"""Rows tokenized together: enough to keep every processor busy, little enough to hold (a token takes about 150 bytes on its way)."""


@dataclass(frozen=True)
class Reading:
    """All that decides what becomes of a row."""

    opened: tuple[str, ...]
    """What opens the source, as it was typed."""
    source: Source
    data: DataConfig
    format_name: str
    tokenizer: ChatTokenizer


def read_rows(reading: Reading, numbers: Iterable[int]) -> tuple[ExampleTable, Counts]:
    """The examples of these rows of the source, in this order, and the counts. Never raises on what a row holds."""
    data, counts = reading.data, Counts()
    rows: list[RowRead] = []
    merges_system = reading.format_name != "text" and reading.tokenizer.template.merges_system
    for batch in _batches(reading, numbers):
        conversations = [found for found in batch if isinstance(found, Conversation)]
        encoded = iter(
            encode(conversations, reading.tokenizer, train_on=data.train_on, max_length=data.max_length, on_overlong=data.on_overlong)
        )
        for found in batch:
            result = found if isinstance(found, Problem) else next(encoded)
            if isinstance(result, Problem):
                counts.note_problem(result)
                rows.append(RowRead((), "bad"))
            else:
                assert isinstance(found, Conversation)
                rows.append(_kept(result))
                counts.system_merged += merges_system and found.text is None and found.turns[0]["role"] == "system"
                counts.note_length(result, found.row.where, kept=bool(rows[-1].examples))
    table = build_table(rows, reading.source.paths)
    counts.count_table(table)
    return table, counts


def _batches(reading: Reading, numbers: Iterable[int]) -> Iterator[list[Conversation | Problem]]:
    batch: list[Conversation | Problem] = []
    characters = 0
    for number in numbers:
        row = reading.source.parsed(number)
        found = row if isinstance(row, Problem) else understand(row, reading.format_name, reading.data.columns)
        batch.append(found)
        if isinstance(found, Conversation):
            characters += len(found.text or "") + sum(len(str(turn.get("content", ""))) for turn in found.turns)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _kept(encoded: Encoded) -> RowRead:
    """The row's examples that teach something, and what it lost."""
    if encoded.outcome == "dropped":
        return RowRead((), "dropped", encoded.num_tokens, encoded.num_targets)
    kept = [example for example in encoded.examples if np.any(example.targets)]
    cut_tokens, cut_targets = sum(example.cut for example in encoded.examples), sum(example.cut_targets for example in encoded.examples)
    return RowRead(kept, encoded.outcome if kept else "without_targets", cut_tokens, cut_targets)
