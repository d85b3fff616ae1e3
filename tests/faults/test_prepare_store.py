"""Preparations that are killed, damaged, or running twice: a store that is used is always complete and correct."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.processes import alive
from tests.support.projects import wait_until
from tests.support.stores import ROWS, STORES, equal, whole, write_chats
from tests.support.tokenizers import CHATML, train_tokenizer

from llamahome import durable
from llamahome.data.files.sources import Source
from llamahome.data.records import Row
from llamahome.data.store.store import Store
from llamahome.data.store.table import COLUMNS
from llamahome.data.text.tokens import ChatTokenizer, load_tokenizer
from llamahome.errors import Problem


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(model: Path) -> ChatTokenizer:
    return load_tokenizer(model)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_chats(ROWS)
    return tmp_path


def stores() -> list[str]:
    return sorted(path.name for path in STORES.iterdir() if path.name != "index")


@pytest.fixture
def expected(tokenizer: ChatTokenizer, tmp_path: Path) -> Store:
    """What an undisturbed preparation gives, kept elsewhere."""
    return whole(tokenizer, processed=tmp_path / "elsewhere")


PREPARER = """
import os
import signal
import sys
from pathlib import Path

from llamahome import durable
from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import open_source
from llamahome.data.store.row_reader import RowReader
from llamahome.data.store.shards import Task, make_store
from llamahome.data.text.tokens import load_tokenizer
from llamahome.rundir import PROCESSED_DATA

if "kill-at-rename" in sys.argv:
    def kill_at_the_store(operation, path, source):
        if operation == "rename" and not path.name.endswith(".rows"):
            os.kill(os.getpid(), signal.SIGKILL)

    durable.observer = kill_at_the_store
reader = RowReader(("rows.jsonl",), open_source("rows.jsonl"), DataConfig(), "messages", load_tokenizer(sys.argv[1]))
task = Task(reader, PROCESSED_DATA, text_bytes=1.0, max_shard_rows=30, max_processes=int(sys.argv[2]))
store = make_store(task, say=lambda text: print(text, flush=True))
print("done", len(store.table), flush=True)
"""


def preparer(model: Path, *more: str, processes: int) -> "subprocess.Popen[str]":
    Path("preparer.py").write_text(PREPARER)
    words = [sys.executable, "preparer.py", str(model), str(processes), *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished_shards() -> list[Path]:
    return sorted(STORES.glob("*.parts/shard-*.rows"))


@pytest.mark.medium
@pytest.mark.parametrize("processes", [1, 3])
def test_a_killed_preparation_goes_on_after_its_finished_shards(model: Path, tokenizer: ChatTokenizer, processes: int) -> None:
    write_chats(6_000)
    with preparer(model, processes=processes) as killed:
        wait_until(lambda: len(finished_shards()) >= 3)
        workers = [int(word) for word in Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()]
        killed.send_signal(signal.SIGKILL)
    assert len(workers) == processes - 1 and not any(alive(pid, within=10) for pid in workers)
    done = {path: path.stat().st_mtime_ns for path in finished_shards()}
    assert 3 <= len(done) < 200 and len(stores()) == 1
    with preparer(model, processes=2) as second:
        out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert f"going on with a preparation that was interrupted: {len(done)} of 200 parts are done" in out
    (name,) = stores()
    assert "." not in name
    assert equal(whole(tokenizer), whole(tokenizer, processed=Path("elsewhere")))


@pytest.mark.medium
def test_a_preparation_killed_at_its_end_is_only_merged_again(model: Path, expected: Store, tokenizer: ChatTokenizer) -> None:
    with preparer(model, "kill-at-rename", processes=1) as killed:
        killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL and [name.split(".")[-1] for name in stores()] in (["tmp", "parts"], ["parts", "tmp"])
    with preparer(model, processes=2) as second:
        out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "14 of 14 parts are done" in out and len(stores()) == 1 and equal(whole(tokenizer), expected)


def test_a_store_of_an_earlier_state_of_the_files_is_removed_and_no_other(tokenizer: ChatTokenizer) -> None:
    before, other = whole(tokenizer).folder, whole(tokenizer, train_on="all").folder
    Path("rows.jsonl").rename("same.jsonl")
    elsewhere = whole(tokenizer, path="same.jsonl").folder
    write_chats(ROWS + 3)
    after = whole(tokenizer).folder
    assert len({before, other, elsewhere, after}) == 4 and {STORES / name for name in stores()} == {elsewhere, after}


@pytest.mark.medium
def test_two_at_once_do_not_harm_each_other(model: Path, expected: Store, tokenizer: ChatTokenizer) -> None:
    both = [preparer(model, processes=1) for _ in range(2)]
    for process in both:
        with process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.endswith(f"done {ROWS}\n"), err
    assert len(stores()) == 1 and equal(whole(tokenizer), expected)


def test_two_at_once_without_locks_do_not_harm_each_other(
    expected: Store, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins and ends while the first writes its shards."""
    nested: list[int] = []

    class Interrupted(Source):
        def parsed(self, number: int) -> Row | Problem:
            if number == 5 * 30 and not nested:
                nested.append(number)
                assert equal(whole(tokenizer), expected)
            return super().parsed(number)

    def unlockable(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unlockable)
    assert equal(whole(tokenizer, kind=Interrupted), expected) and nested == [5 * 30]
    assert len(stores()) == 1 and equal(whole(tokenizer), expected)


def test_shards_that_vanish_while_one_is_written_are_written_again(
    expected: Store, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process does to another one where locks do not work: it removes the shards that it has merged."""
    removed: list[Path] = []

    def remove(operation: str, path: Path, source: Path | None) -> None:
        if operation == "rename" and path.name == "shard-000004.rows" and not removed:
            removed.append(path)
            shutil.rmtree(path.parent, ignore_errors=True)  # as `merge` does: another thread may write there at this moment

    monkeypatch.setattr(durable, "observer", remove)
    assert equal(whole(tokenizer), expected) and len(removed) == 1 and len(stores()) == 1


@pytest.mark.parametrize("column", [*COLUMNS, "manifest.json"])
def test_a_flipped_bit_is_found_and_repaired(expected: Store, tokenizer: ChatTokenizer, column: str) -> None:
    before = whole(tokenizer)
    path, source = before.folder / column, random.Random(column)
    sound = path.read_bytes()
    for _ in range(3):
        broken = bytearray(sound)
        broken[source.randrange(len(broken))] ^= 1 << source.randrange(8)
        path.write_bytes(broken)
        assert equal(whole(tokenizer), expected)
        assert path.read_bytes() == sound


@pytest.mark.parametrize("column", ["tokens", "firsts", "manifest.json"])
def test_a_torn_or_missing_file_is_made_again(expected: Store, tokenizer: ChatTokenizer, column: str) -> None:
    before = whole(tokenizer)
    path = before.folder / column
    for harm in (lambda: os.truncate(path, path.stat().st_size // 2), path.unlink):
        harm()
        assert equal(whole(tokenizer), expected)


def test_a_damaged_shard_is_made_again_before_the_shards_are_merged(expected: Store, tokenizer: ChatTokenizer) -> None:
    damaged: list[Path] = []

    class Damaging(Source):
        def parsed(self, number: int) -> Row | Problem:
            if number == 7 * 30 and not damaged:
                damaged.append(finished_shards()[2])
                content = bytearray(damaged[0].read_bytes())
                content[len(content) // 2] ^= 4
                damaged[0].write_bytes(content)
            return super().parsed(number)

    assert equal(whole(tokenizer, kind=Damaging), expected) and damaged[0].name == "shard-000002.rows"


def test_another_tokenizer_template_setting_or_file_has_a_store_of_its_own(model: Path, tokenizer: ChatTokenizer) -> None:
    template = Path("other.jinja")
    template.write_text(CHATML.replace("im_start", "endoftext"))
    names = set()
    for each in (tokenizer, load_tokenizer(model, chat_template=str(template)), ChatTokenizer(train_tokenizer(vocabulary=300))):
        names.add(whole(each).folder)
    for settings in ({"max_length": 20}, {"train_on": "all"}, {"on_overlong": "drop"}):
        names.add(whole(tokenizer, **settings).folder)
    write_chats(ROWS + 1)
    names.add(whole(tokenizer).folder)
    assert len(names) == 7
    same: list[dict[str, Any]] = [{"on_bad_row": "skip"}, {"eval_split": 7}, {"mixture": {"rows.jsonl": 2}}]
    assert {whole(tokenizer, **settings).folder for settings in same} == {whole(tokenizer).folder}


def test_a_store_of_other_data_under_the_right_name_is_not_used(expected: Store, model: Path, tokenizer: ChatTokenizer) -> None:
    right = whole(tokenizer).folder
    other = whole(tokenizer, train_on="all").folder
    shutil.rmtree(right)
    other.rename(right)
    assert equal(whole(tokenizer), expected)
