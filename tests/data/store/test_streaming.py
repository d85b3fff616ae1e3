"""Prepared and streamed data give the same examples in the same steps from any position; a stream counts what it drops."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.processes import alive, children
from tests.support.tokenizers import train_tokenizer

from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import Source
from llamahome.data.prepare import Prepared, prepare
from llamahome.data.records import Microbatch, Row
from llamahome.data.steps.loader import Loader
from llamahome.data.store import streaming
from llamahome.data.store.row_reader import RowReader, read_rows
from llamahome.data.store.streaming import StreamedExamples
from llamahome.data.store.workers import call
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import DataError, MachineError, Problem

Rows = list[dict[str, Any] | str]
SKIP = {"on_bad_row": "skip", "max_bad_share": 0.5, "max_lost_share": 1}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = children()
    yield tmp_path
    assert set(children()) <= set(before), "a process was left behind"


def write(rows: Rows, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def texts(count: int, *, seed: int = 0) -> Rows:
    """Plain texts, some of which are split, too short to teach anything, or no rows at all."""
    source = random.Random(seed)
    words = ("the", "cat", "sat", "on", "a", "mat", "Paris", "hello", "9")
    made: Rows = [{"text": f"{number} " + " ".join(source.choices(words, k=source.randint(1, 30)))} for number in range(count)]
    for number in range(0, count, 97):
        made[number] = "{broken"
    return made


def chats(count: int) -> Rows:
    asked = ({"role": "user", "content": f"q {n} " + "word " * (n % 40)} for n in range(count))
    return [{"messages": [question, {"role": "assistant", "content": "Fine, thank you."}]} for question in asked]


def opened(path: str | list[str], tokenizer: ChatTokenizer, **settings: Any) -> Prepared:
    return prepare(DataConfig(**settings), path, tokenizer, say=lambda _: None)


def steps(found: Prepared, *, total: int, start: int = 0, **settings: Any) -> list[list[Microbatch]]:
    chosen = {"batch_size": 32, "micro_batch_tokens": 200, "seed": 5} | settings
    with Loader(found.examples, found.order, total_positions=total, start_position=start, judge=found.judge, **chosen) as loader:
        return [batch.microbatches for batch in loader]


def same(one: list[list[Microbatch]], other: list[list[Microbatch]]) -> bool:
    """Whether both are the same micro-batches in the same order, token for token."""
    pairs = [(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)]
    return all(
        a.keys == b.keys and a.lengths == b.lengths and torch.equal(a.tokens_T, b.tokens_T) and torch.equal(a.labels_N, b.labels_N)
        for a, b in pairs
    )


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_ten_thousand_rows_give_the_same_steps_prepared_and_streamed(tokenizer: ChatTokenizer, kind: str) -> None:
    path = write(texts(10_000) if kind == "texts" else chats(10_000))
    settings: dict[str, Any] = {**SKIP, "max_length": 24, "on_overlong": "split" if kind == "texts" else "drop"}
    prepared, streamed = (opened(path, tokenizer, streaming=mode, **settings) for mode in (False, True))
    with closing(prepared), closing(streamed):
        assert prepared.report.bad == (104 if kind == "texts" else 0)
        assert (prepared.report.split if kind == "texts" else prepared.report.overlong_dropped) > 1000
        assert prepared.fingerprint == streamed.fingerprint and streamed.streams and not prepared.streams
        assert prepared.evaluation is not None and streamed.evaluation is not None
        assert prepared.evaluation.tokens.tolist() == streamed.evaluation.tokens.tolist()
        total = 2 * prepared.order.epoch_rows + 1000
        expected = steps(prepared, total=total, batch_size=128)
        assert same(expected, steps(streamed, total=total, batch_size=128))
        for first in (1, 77, len(expected) - 2):
            assert same(
                expected[first : first + 3], steps(streamed, total=min(total, 128 * (first + 3)), start=128 * first, batch_size=128)
            )


@pytest.mark.medium
def test_the_number_of_workers_and_ranks_does_not_change_the_steps(tokenizer: ChatTokenizer) -> None:
    path = write(texts(700))
    prepared = opened(path, tokenizer, streaming=False, max_length=24, **SKIP)
    streamed = opened(path, tokenizer, streaming=True, max_length=24, **SKIP)
    more = StreamedExamples(streamed.reading, processes=3)
    with closing(prepared), closing(streamed):
        try:
            assert len(more.pids()) == 3 == more.threads
            for rank in range(2):
                settings = {"batch_size": 16, "micro_batch_tokens": 100, "seed": 1, "total_positions": 900, "rank": rank, "world_size": 2}
                with Loader(more, streamed.order, **settings) as loader:
                    found = [batch.microbatches for batch in loader]
                with Loader(prepared.examples, prepared.order, **settings) as loader:
                    assert same(found, [batch.microbatches for batch in loader])
        finally:
            more.close()


@pytest.mark.medium
def test_a_stream_counts_what_it_drops(tokenizer: ChatTokenizer) -> None:
    path = write(texts(600))
    streamed = opened(path, tokenizer, streaming=True, max_length=24, on_overlong="truncate", eval_split=0, **SKIP)
    prepared = opened(path, tokenizer, streaming=False, max_length=24, on_overlong="truncate", eval_split=0, **SKIP)
    with closing(prepared), closing(streamed):
        counted = []
        for found in (prepared, streamed):
            with Loader(found.examples, found.order, batch_size=50, micro_batch_tokens=99, seed=0, total_positions=600) as loader:
                next(loader)
                assert loader.seen.rows == 50
                list(loader)
                counted.append(loader.seen)
        assert counted[0].sums() == counted[1].sums()
        report = prepared.report
        assert (counted[1].bad, counted[1].truncated, counted[1].cut_tokens) == (report.bad, report.overlong_truncated, report.cut_tokens)
        assert (counted[1].examples, counted[1].tokens) == (report.examples, report.tokens) and report.bad == 7


def test_a_bad_row_stops_a_stream_and_is_located(tokenizer: ChatTokenizer) -> None:
    rows = chats(900)
    rows[700] = "{broken"
    streamed = opened(write(rows), tokenizer, streaming=True, eval_split=0)
    with closing(streamed), pytest.raises(DataError) as caught:
        steps(streamed, total=900)
    assert [problem.where for problem in caught.value.problems] == ["rows.jsonl:701", "rows.jsonl"]
    assert "on_bad_row=skip" in str(caught.value.problems[-1].hint)


@pytest.mark.medium
def test_a_fault_of_all_rows_is_reported_before_training(tokenizer: ChatTokenizer) -> None:
    for rows, code in (
        (["{broken"] * 300, "data.bad-json"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 300, "data.no-assistant"),
    ):
        with pytest.raises(DataError) as caught:
            opened(write([*chats(1), *rows]), tokenizer, streaming=True, eval_split=0)
        assert caught.value.problems[0].code == code
    with pytest.raises(DataError) as caught:
        opened(write(chats(400)), tokenizer, streaming=True, eval_split=0, max_length=8)
    assert caught.value.problems[0].code == "data.no-targets"


@pytest.mark.medium
def test_skipping_ends_when_too_many_rows_are_bad(tokenizer: ChatTokenizer) -> None:
    path = write([row if number % 10 else "{broken" for number, row in enumerate(chats(2000))])
    settings: dict[str, Any] = {"streaming": True, "on_bad_row": "skip", "eval_split": 0}
    enough = opened(path, tokenizer, max_bad_share=0.1, **settings)
    with closing(enough):
        assert len(steps(enough, total=2000)) == 63
    few = opened(path, tokenizer, max_bad_share=0.05, **settings)
    with closing(few):
        with pytest.raises(DataError) as caught:
            steps(few, total=2000)
        assert caught.value.problems[-1].code == "data.bad-rows" and "max_bad_share" in caught.value.problems[-1].message
        assert str(caught.value.problems[0].where).startswith("rows.jsonl:")


def test_a_worker_that_dies_ends_the_run_with_its_rows(tokenizer: ChatTokenizer) -> None:
    streamed = opened(write(chats(3000)), tokenizer, streaming=True, eval_split=0)
    with closing(streamed):
        assert isinstance(streamed.examples, StreamedExamples)
        with Loader(streamed.examples, streamed.order, batch_size=8, micro_batch_tokens=99, seed=0, total_positions=3000) as loader:
            next(loader)
            (pid,) = streamed.examples.pids()
            subprocess.run(["kill", "-9", str(pid)], check=True)
            with pytest.raises(MachineError) as caught:
                list(loader)
    (problem,) = caught.value.problems
    assert problem.code == "data.worker-failed" and "signal 9" in problem.message and str(problem.where).startswith("rows.jsonl:")
    assert not alive(pid)


class Brittle(Source):
    """Fails at its third row in a way that nobody foresaw."""

    def parsed(self, number: int) -> Row | Problem:
        """As every source, but for that row."""
        return [super().parsed(number)][number == 2]


def test_a_defect_in_a_worker_is_reported_with_the_row_that_causes_it(tokenizer: ChatTokenizer) -> None:
    path = write(chats(5))
    reading = RowReader((path,), Brittle((path,)), DataConfig(), "messages", tokenizer)
    with pytest.raises(IndexError) as caught:
        call(lambda rows: read_rows(reading, rows), [0, 1, 4, 2, 3])
    assert caught.value.rows == [2]  # type: ignore[attr-defined]
    assert call(lambda rows: read_rows(reading, rows), [0, 1, 3])[1].rows == 3


@pytest.mark.medium
def test_a_file_that_changes_ends_the_stream(tokenizer: ChatTokenizer) -> None:
    streamed = opened(write(chats(500)), tokenizer, streaming=True, eval_split=0)
    with closing(streamed):
        write(chats(501))
        with pytest.raises(DataError) as caught:
            steps(streamed, total=500)
    assert caught.value.problems[0].code == "data.file-changed"


@pytest.mark.medium
def test_a_tokenizer_that_cannot_be_rebuilt_is_used_in_this_process() -> None:
    raw = train_tokenizer()
    odd = ChatTokenizer(raw)
    odd.__dict__["fingerprint"] = "another"
    path = write(chats(60))
    streamed, plain = (opened(path, each, streaming=True, eval_split=0) for each in (odd, ChatTokenizer(raw)))
    with closing(streamed), closing(plain):
        assert same(steps(streamed, total=60), steps(plain, total=60))


@pytest.mark.medium
def test_streaming_auto_streams_only_large_data(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(chats(50))
    small = opened(path, tokenizer, eval_split=0)
    small.close()
    assert not small.streams
    monkeypatch.setattr("llamahome.data.store.kept.PREPARED_BYTES", 10)
    there = opened(path, tokenizer, eval_split=0)
    there.close()
    assert not there.streams, "a store that is there is used"
    large = opened(path, tokenizer, eval_split=0, train_on="all")
    large.close()
    assert large.streams and large.report.sampled_rows == 50
    assert streaming.StreamedExamples is type(large.examples)


@pytest.mark.medium
def test_a_worker_ends_when_its_parent_is_killed(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    write(chats(50))
    train_tokenizer().save_pretrained("model")
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        subprocess.run(["kill", "-INT", *map(str, pids)], check=True)
        assert parent.stdout.readline() == "still works\n"
        parent.kill()
    assert not any(alive(pid, within=10.0) for pid in pids)


PARENT = """
import sys
import time

from llamahome.config.schema import DataConfig
from llamahome.data.prepare import prepare
from llamahome.data.store.streaming import StreamedExamples
from llamahome.data.store.workers import call
from llamahome.data.text.tokens import load_tokenizer

found = prepare(DataConfig(streaming=True, eval_split=0), "rows.jsonl", load_tokenizer("model"), say=lambda text: None)
found.close()
stream = StreamedExamples(found.reading, processes=2)
stream.examples_of(found.order.first_rows(3))
stream.examples_of(found.order.first_rows(3))
print(*stream.pids(), flush=True)
time.sleep(0.5)
stream.examples_of(found.order.first_rows(3))
stream.examples_of(found.order.first_rows(3))
print("still works", flush=True)
time.sleep(600)
"""
