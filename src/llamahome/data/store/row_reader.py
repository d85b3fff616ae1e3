"""Rows of a source to examples and counts, in this process or in several.

The stored examples, the stream and every worker process read rows with `read_rows`. Memory: one batch of text (`_BATCH_CHARACTERS` and one
row) besides the examples.
"""

import shlex
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import Source, open_source
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.data.store.counts import Counts
from llamahome.data.store.pairs import learned_of, sides, together
from llamahome.data.store.table import ExampleTable, RowRead, build_table
from llamahome.data.store.workers import CannotOpen, Work, WorkerFailed, WorkerPool
from llamahome.data.text.targets import Encoded, encode
from llamahome.data.text.tokenizer_files import SystemRole
from llamahome.data.text.tokens import ChatTokenizer, load_tokenizer
from llamahome.errors import DataError, MachineError, Problem

_BATCH_ROWS, _BATCH_CHARACTERS = 128, 1 << 20
"""Rows tokenized together: enough to keep every processor busy, few enough to hold (a token takes about 150 bytes while it is encoded)."""
_SHOWN_ROWS = 3


@dataclass(frozen=True)
class RowReader:
    """The source, and everything that decides which examples its rows become."""

    opened: tuple[str, ...]
    """The paths, as the user typed them."""
    source: Source
    data: DataConfig
    format_name: str
    tokenizer: ChatTokenizer


def read_rows(reader: RowReader, numbers: Iterable[int]) -> tuple[ExampleTable, Counts]:
    """The examples of these rows of the source, in this order, and their counts. A bad row is counted, never raised."""
    data, counts = reader.data, Counts()
    rows: list[RowRead] = []
    train_on = learned_of(reader.format_name, data)
    merges_system = reader.format_name != "text" and reader.tokenizer.template.merges_system
    for batch in _batches(reader, numbers):
        conversations = [side for item in batch if isinstance(item, Conversation) for side in sides(item)]
        encoded = iter(encode(conversations, reader.tokenizer, train_on=train_on, max_length=data.max_length, on_overlong=data.on_overlong))
        for item in batch:
            result = item if isinstance(item, Problem) else together([next(encoded) for _ in sides(item)])
            if isinstance(result, Problem):
                counts.add_problem(result)
                rows.append(RowRead((), "bad"))
            else:
                assert isinstance(item, Conversation)
                rows.append(_row_read(result))
                counts.system_merged += merges_system and item.text is None and item.turns[0]["role"] == "system"
                counts.add_length(result, item.row.where, kept=bool(rows[-1].examples))
    table = build_table(rows, reader.source.paths)
    counts.count_table(table)
    return table, counts


class ParallelReader:
    """Calls `read_rows` in worker processes. Any thread may call `read`. Close it.

    With `local`, or without processes, this process reads rows too. Each worker makes the tokenizer again from a description; if the
    fingerprint differs, this process reads all rows. Either way it reads for one caller at a time.
    """

    def __init__(self, reader: RowReader, *, processes: int, niceness: int = 0, local: bool) -> None:
        self.processes = processes
        self._reader = reader
        self._lock = threading.Lock()
        self._same_tokenizer = True
        tokenizer, source = reader.tokenizer, reader.source
        self._pool: WorkerPool[tuple[ExampleTable, Counts]] = WorkerPool(
            _open_reader,
            (source.paths, source.fingerprint, reader.data, reader.format_name),
            (tokenizer.describe(), tokenizer.system_role, tokenizer.fingerprint),
            processes=processes,
            niceness=niceness,
            local=self._read_here if local or not processes else None,
        )

    def read(self, numbers: Sequence[int]) -> tuple[ExampleTable, Counts]:
        """The examples and counts of these rows; raises DataError if a file has changed, MachineError if a worker fails."""
        if self._same_tokenizer:
            try:
                table, counts = self._pool(numbers)
                return replace(table, paths=self._reader.source.paths), counts
            except CannotOpen:
                self._same_tokenizer = False
            except WorkerFailed as failure:
                raise MachineError(_worker_problem(failure, self._reader)) from failure
        return self._read_here(numbers)

    def pids(self) -> list[int]:
        """Ids of the worker processes."""
        return self._pool.pids

    def close(self) -> None:
        """End the worker processes; may be called twice."""
        self._pool.close()

    def _read_here(self, numbers: Sequence[int]) -> tuple[ExampleTable, Counts]:
        with self._lock:
            return read_rows(self._reader, numbers)


def _batches(reader: RowReader, numbers: Iterable[int]) -> Iterator[list[Conversation | Problem]]:
    batch: list[Conversation | Problem] = []
    characters = 0
    for number in numbers:
        row = reader.source.parsed(number)
        item = row if isinstance(row, Problem) else understand(row, reader.format_name, reader.data.columns)
        batch.append(item)
        if isinstance(item, Conversation):
            characters += len(item.text or "") + sum(len(str(turn.get("content", ""))) for turn in (*item.turns, *item.other))
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _row_read(encoded: Encoded) -> RowRead:
    """The row's examples that have targets, and what was cut from it."""
    if encoded.outcome == "dropped":
        return RowRead((), "dropped", encoded.num_tokens, encoded.num_targets)
    kept = [example for example in encoded.examples if np.any(example.targets)]
    cut_tokens, cut_targets = sum(example.cut for example in encoded.examples), sum(example.cut_targets for example in encoded.examples)
    return RowRead(kept, encoded.outcome if kept else "without_targets", cut_tokens, cut_targets)


def _open_reader(
    rows: tuple[tuple[str, ...], str, DataConfig, str], tokenizer: tuple[dict[str, str], SystemRole, str]
) -> Work[tuple[ExampleTable, Counts]]:
    """In a worker: open the same source and tokenizer as the parent, or refuse to."""
    paths, fingerprint, data, format_name = rows
    files, system_role, tokenizer_fingerprint = tokenizer
    with tempfile.TemporaryDirectory(prefix="llamahome-") as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        opened = load_tokenizer(folder, system_role=system_role)
    if opened.fingerprint != tokenizer_fingerprint:
        raise CannotOpen
    source = open_source(paths)
    if source.fingerprint != fingerprint:
        hint = "run again when nothing writes to it"
        raise DataError(Problem(code="data.file-changed", message="a file was changed while it was read", where=paths[0], hint=hint))
    reader = RowReader(paths, source, data, format_name, opened)

    def read(numbers: Sequence[int]) -> tuple[ExampleTable, Counts]:
        table, counts = read_rows(reader, numbers)
        return replace(table, paths=()), counts  # the parent knows them, and there may be thousands

    return read


def _worker_problem(failure: WorkerFailed, reader: RowReader) -> Problem:
    """What happened, and which rows the worker was reading."""
    message, rows = f"a process that tokenizes {failure.reason}", failure.rows
    if not rows:
        hint = "free some memory: each process that tokenizes takes about 150 MB"
        return Problem(code="data.worker-failed", message=f"{message}, before it read a row", hint=hint)
    first = [reader.source.parsed(number) for number in rows[:_SHOWN_ROWS]]
    where = [row.where or "" for row in first]
    more = f" and {len(rows) - len(where):,} more" if len(rows) > len(where) else ""
    while_reading = f", while it read {', '.join(where)}{more}" if len(rows) > 1 else ""
    shown = f"llamahome data show {shlex.quote(first[0].source)} --row {first[0].index}" if isinstance(first[0], Row) else None
    return Problem(code="data.worker-failed", message=message + while_reading, where=where[0], hint=shown)
