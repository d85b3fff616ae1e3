"""Preparations without room or without a place to write: an error without remains, or rows that are streamed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.small_disks import small_disk
from tests.support.stores import ROWS, equal, whole, write_chats
from tests.support.tokenizers import train_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.prepare import Prepared, prepare, read_all
from llamahome.data.store.store import Store
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import MachineError


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_chats(ROWS)


@pytest.fixture
def expected(tokenizer: ChatTokenizer, tmp_path: Path) -> Store:
    """What an undisturbed preparation gives, kept elsewhere."""
    return whole(tokenizer, processed=tmp_path / "elsewhere")


@pytest.mark.medium
@pytest.mark.parametrize("size", ["40k", "140k"])
def test_a_full_disk_is_an_error_and_no_half_store_is_left(tokenizer: ChatTokenizer, size: str) -> None:
    """The smaller disk is full while shards are written, the larger one when they are put together."""
    with small_disk(Path("disk"), size) as disk:
        with pytest.raises(MachineError) as caught:
            whole(tokenizer, processed=disk)
        assert caught.value.problems[0].code == "data.store-full" and "data.streaming=true" in str(caught.value.problems[0].hint)
        assert list(disk.iterdir()) == []
        with pytest.raises(MachineError):
            prepare(DataConfig(), "rows.jsonl", tokenizer, say=lambda _: None, processed=disk)
        with pytest.raises(MachineError) as caught:
            prepare(DataConfig(streaming=False), "rows.jsonl", tokenizer, say=lambda _: None, processed=disk)
        assert caught.value.problems[0].hint == "free room there", "what needs all rows cannot be streamed"
        streamed = prepare(DataConfig(streaming=True), "rows.jsonl", tokenizer, say=lambda _: None, processed=disk)
        streamed.close()
        assert streamed.streams and list(disk.iterdir()) == []


@pytest.mark.medium
def test_without_a_place_to_write_rows_are_streamed_or_kept_in_memory(expected: Store, tokenizer: ChatTokenizer) -> None:
    Path("taken").write_text("a file where a folder should be")
    said: list[str] = []

    def opened(**settings: Any) -> Prepared:
        return prepare(DataConfig(**settings), "rows.jsonl", tokenizer, say=said.append, processed=Path("taken/here"))

    found = opened()
    found.close()
    assert found.streams and "tokenized while the model trains" in said[-1]
    kept = opened(streaming=False)  # as an objective with a reference needs them
    kept.close()
    assert not kept.streams and kept.folder is None and "kept in memory" in said[-1]
    assert isinstance(kept.examples, ExampleTable) and kept.fingerprint == found.fingerprint
    pairs = zip(kept.examples.columns().values(), expected.table.columns().values(), strict=True)
    assert all(np.array_equal(left, right) for left, right in pairs)
    assert equal(read_all(DataConfig(), "rows.jsonl", tokenizer, say=lambda _: None, processed=Path("taken/here")), expected)
