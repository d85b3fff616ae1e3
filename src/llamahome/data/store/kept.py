"""All rows of a source, tokenized before training: from the store, from memory if it cannot be written, or not at all but streamed."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llamahome.data.store.counts import Counts
from llamahome.data.store.row_reader import read_rows
from llamahome.data.store.shards import Task, make_store, ready_store
from llamahome.data.store.table import ExampleTable
from llamahome.distributed.processors import usable_cpus
from llamahome.errors import MachineError

PREPARED_BYTES = 60 * 2_500_000
"""Text that one processor tokenizes in about a minute; measured: 2.5 MB/s with the starter's tokenizer."""
Say = Callable[[str], None]


class Kept(NamedTuple):
    """Every row of a source, tokenized."""

    table: ExampleTable
    counts: Counts
    folder: Path | None
    """Where the store is; None if the rows are in memory."""


def kept_rows(task: Task, *, say: Say) -> Kept | None:
    """All rows, from the store, which is made now if that takes about a minute or is required; None if rows are to be streamed."""
    streaming = task.reading.data.streaming
    if streaming is True:
        return None
    if streaming is False:
        return all_rows(task, say=say)
    store = ready_store(task)
    if store is None:
        if task.text_bytes > PREPARED_BYTES * usable_cpus():
            return None
        try:
            store = make_store(task, say=say)
        except MachineError as error:
            if error.problems[0].code != "data.store-unwritable":
                raise
            say(f"{error.problems[0].message}; rows are tokenized while the model trains")
            return None
    return Kept(store.table, store.counts, store.folder)


def all_rows(task: Task, *, say: Say) -> Kept:
    """All rows, from the store, which is made if it does not exist, or from memory if it cannot be written."""
    try:
        store = ready_store(task) or make_store(task, say=say)
    except MachineError as error:
        if error.problems[0].code != "data.store-unwritable":
            raise
        say(f"{error.problems[0].message}; they are kept in memory")
        return Kept(*read_rows(task.reading, range(len(task.reading.source))), None)
    return Kept(store.table, store.counts, store.folder)
