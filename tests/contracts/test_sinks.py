"""Every sink keeps what it is given under the same names, survives a full disk, and loses nothing when the disk recovers."""

import json
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.monitoring.sinks import AppendFile, DiskTrouble, JsonlSink, Sink, TensorBoardSink, json_line

METRICS = {"train/loss": 2.5, "train/grad_norm": 0.125, "system/net_sent": 1024.0}


def read_jsonl(folder: Path) -> dict[tuple[int, str], float]:
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step, _ = record.pop("step"), record.pop("t")
        for name, value in record.items():
            assert (step, name) not in found, "each metric of a step is written once"
            found[step, name] = value
    return found


def read_tensorboard(folder: Path) -> dict[tuple[int, str], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {}
    for name in reader.Tags()["scalars"]:
        for event in reader.Scalars(name):
            assert (event.step, name) not in found, "each metric of a step is shown once"
            found[event.step, name] = event.value
    return found


Read = Callable[[Path], dict[tuple[int, str], float]]
Open = Callable[[Path, DiskTrouble], Sink]


@pytest.fixture(params=["jsonl", "tensorboard"])
def family(request: pytest.FixtureRequest) -> tuple[Open, Read]:
    if request.param == "jsonl":
        return lambda folder, trouble: JsonlSink(folder / "metrics.jsonl", trouble=trouble), read_jsonl
    return lambda folder, trouble: TensorBoardSink(folder, purge_step=None, trouble=trouble), read_tensorboard


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_warning(message: str) -> None:
    raise AssertionError(message)


def test_what_is_logged_is_read_back_under_the_same_names(tmp_path: Path, family: tuple[Open, Read]) -> None:
    open_sink, read = family
    sink = open_sink(tmp_path, DiskTrouble(no_warning))
    for step in range(1, 6):
        sink.log(step, 1_700_000_000.0 + step, {name: value * step for name, value in METRICS.items()})
    sink.close()
    assert read(tmp_path) == {(step, name): value * step for step in range(1, 6) for name, value in METRICS.items()}


def test_a_line_is_there_before_the_sink_is_closed(tmp_path: Path, family: tuple[Open, Read]) -> None:
    open_sink, read = family
    sink = open_sink(tmp_path, DiskTrouble(no_warning))
    sink.log(1, 1.0, METRICS)
    assert read(tmp_path)[1, "train/loss"] == 2.5
    sink.close()


def test_a_full_disk_is_told_once_and_nothing_is_lost_when_it_recovers(tmp_path: Path, family: tuple[Open, Read]) -> None:
    open_sink, read = family
    told: list[str] = []
    trouble = DiskTrouble(told.append)
    sink = open_sink(tmp_path, trouble)
    with files_no_larger_than(1000):
        for step in range(1, 41):
            sink.log(step, float(step), METRICS)
    before = read(tmp_path)
    assert 0 < len(before) < 40 * len(METRICS), "some fit, and no half record stops the reader"
    assert len(told) == 1
    assert "training goes on" in told[0]
    assert trouble.failures > 1
    sink.log(41, 41.0, METRICS)
    sink.close()
    assert read(tmp_path) == {(step, name): value for step in range(1, 42) for name, value in METRICS.items()}
    assert trouble.lost_bytes == 0


def test_what_a_full_disk_never_took_is_counted_as_lost_at_the_end(tmp_path: Path, family: tuple[Open, Read]) -> None:
    open_sink, read = family
    told: list[str] = []
    trouble = DiskTrouble(told.append)
    sink = open_sink(tmp_path, trouble)
    with files_no_larger_than(1000):
        for step in range(1, 41):
            sink.log(step, float(step), METRICS)
        sink.close()
    assert trouble.lost_bytes > 0
    assert any("lost" in message for message in told)
    assert read(tmp_path)


def test_a_second_spell_of_trouble_is_told_again(tmp_path: Path) -> None:
    told: list[str] = []
    sink = JsonlSink(tmp_path / "metrics.jsonl", trouble=DiskTrouble(told.append))
    for spell in (1, 2):
        with files_no_larger_than(10):
            sink.log(spell, 0.0, METRICS)
            sink.log(spell, 0.0, METRICS)
        sink.log(spell, 0.0, METRICS)
        assert len(told) == spell
    sink.close()


def test_a_folder_that_cannot_be_made_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    told: list[str] = []
    sink = JsonlSink(tmp_path / "taken" / "metrics.jsonl", trouble=DiskTrouble(told.append))
    sink.log(1, 0.0, METRICS)
    sink.close()
    assert told


@settings(deadline=None, max_examples=30)
@given(limit=st.integers(0, 400), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_a_file_never_holds_half_a_record(tmp_path_factory: pytest.TempPathFactory, limit: int, sizes: list[int]) -> None:
    path = tmp_path_factory.mktemp("half") / "records.jsonl"
    file = AppendFile(path, DiskTrouble(lambda message: None))
    records = [bytes([97 + number]) * size + b"\n" for number, size in enumerate(sizes)]
    with files_no_larger_than(limit):
        for record in records:
            file.append(record)
        content = path.read_bytes()
    assert content in [b"".join(records[:count]) for count in range(len(records) + 1)]
    file.append(b"end\n")
    file.close()
    assert path.read_bytes() == b"".join(records) + b"end\n"


def test_a_torn_last_line_does_not_glue_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "one"}\n{"kind": "tw')
    file = AppendFile(path, DiskTrouble(no_warning))
    file.append(json_line({"kind": "three"}))
    file.close()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["one", "three"]


def test_a_torn_line_longer_than_a_block_is_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    file = AppendFile(path, DiskTrouble(no_warning))
    file.append(b"{}\n")
    file.close()
    assert path.read_bytes() == b"{}\n{}\n"


def test_lines_are_strict_json_whatever_the_numbers(tmp_path: Path) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(word)

    line = json_line({"loss": math.nan, "nested": {"values": [math.inf, 1.0]}, "path": tmp_path, "text": "snow ☃ \udc80"})
    record = json.loads(line, parse_constant=refuse)
    assert record["loss"] is None
    assert record["nested"] == {"values": [None, 1.0]}
    assert line.count(b"\n") == 1


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path, purge_step=None, trouble=DiskTrouble(no_warning))
    for step in range(1, 9):
        first.log(step, float(step), {"train/loss": 100.0 + step})
    first.close()
    second = TensorBoardSink(tmp_path, purge_step=6, trouble=DiskTrouble(no_warning))
    for step in range(6, 11):
        second.log(step, float(step), {"train/loss": 200.0 + step})
    second.close()
    assert read_tensorboard(tmp_path) == {(step, "train/loss"): (100.0 if step < 6 else 200.0) + step for step in range(1, 11)}
