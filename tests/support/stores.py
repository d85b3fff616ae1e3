"""Stores of tokenized rows that tests make, and the rows that they make them of."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import Source
from llamahome.data.prepare import StoredExamples
from llamahome.data.store.row_reader import RowReader
from llamahome.data.store.shards import Task, make_store
from llamahome.data.store.store import Store
from llamahome.data.text.tokens import ChatTokenizer

STORES = Path("data/training/processed")
ROWS = 400


def write_chats(count: int) -> None:
    source = random.Random(count)
    lines = []
    for number in range(count):
        question = f"question {number} " + "word " * source.randint(0, 20)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"Answer {number}."}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    Path("rows.jsonl").write_text("".join(lines))


def whole(
    tokenizer: ChatTokenizer, *, path: str = "rows.jsonl", processed: Path = STORES, kind: type[Source] = Source, **settings: Any
) -> Store:
    """The store of the rows, in shards of 30."""
    reader = RowReader((path,), kind((path,)), DataConfig(**settings), "messages", tokenizer)
    return make_store(Task(reader, processed, text_bytes=1.0, max_shard_rows=30), say=lambda _: None)


def equal(one: Store | StoredExamples, other: Store | StoredExamples) -> bool:
    return one.counts == other.counts and all(
        np.array_equal(left, right) for left, right in zip(one.table.columns().values(), other.table.columns().values(), strict=True)
    )
