"""A file whose content changed but not its size and time is another file: no old index, copy or store is used."""

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.tokenizers import train_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.files.guarded_file import ReaderLimits
from llamahome.data.files.sources import open_source
from llamahome.data.prepare import prepare
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import DataError


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(words: list[str]) -> bytes:
    return "".join(json.dumps({"text": word}) + "\n" for word in words).encode()


def stored(words: list[str]) -> bytes:
    return gzip.compress(lines(words), compresslevel=0, mtime=0)


def put_back(path: Path, raw: bytes) -> None:
    """Write other bytes of the same number, then the old time."""
    status = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize(("name", "written"), [("rows.jsonl", lines), ("rows.jsonl.gz", stored)])
def test_neither_the_old_index_nor_the_old_unpacked_copy_is_used(name: str, written: Callable[[list[str]], bytes]) -> None:
    limits = ReaderLimits(cached_file=0)
    path = Path(name)
    path.write_bytes(written(["one", "three"]))
    first = open_source(name, limits=limits)
    before = first.hashes().tolist()
    put_back(path, written(["three", "one"]))
    again = open_source(name, limits=limits)
    assert [again.row(number).value["text"] for number in (0, 1)] == ["three", "one"]
    assert again.hashes().tolist() == before[::-1] and again.fingerprint != first.fingerprint


def test_no_old_store_is_used() -> None:
    path, tokenizer = Path("rows.jsonl"), ChatTokenizer(train_tokenizer())

    def trained_on() -> list[str]:
        prepared = prepare(DataConfig(eval_split=0), str(path), tokenizer, say=lambda _: None)
        table = prepared.examples.examples_of(prepared.order.first_rows(2))
        prepared.close()
        return [tokenizer.decode(table.example(number).tokens) for number in range(2)]

    path.write_bytes(lines(["good morning", "good evening"]))
    first = trained_on()
    put_back(path, lines(["good evening", "good morning"]))
    assert trained_on() == first[::-1]


def test_a_file_put_back_while_it_is_read_is_refused() -> None:
    path = Path("rows.jsonl")
    path.write_bytes(lines(["one", "three"]))
    source = open_source(str(path))
    assert source.row(0).value["text"] == "one"
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    put_back(path, lines(["six", "seven"]))
    with pytest.raises(DataError) as caught:
        source.row(1)
    assert caught.value.problems[0].code == "data.file-changed" and "set back" in caught.value.problems[0].message


def test_a_new_link_or_other_rights_do_not_count_as_a_change() -> None:
    path = Path("rows.jsonl")
    path.write_bytes(lines(["one", "three"]))
    source = open_source(str(path))
    time.sleep(0.02)
    path.with_name("backup").hardlink_to(path)
    assert source.row(1).value["text"] == "three"
    time.sleep(0.02)
    path.chmod(0o400)
    assert source.row(0).value["text"] == "one"
