import hashlib
import json
import sys
from array import array
from pathlib import Path

import pytest
from benchmarks.client import SystemFailed, TrainerProcess
from benchmarks.peers.turn import Fed, peak_memory, row_digest
from hypothesis import given, settings
from hypothesis import strategies as st

Rows = list[tuple[list[int], list[bool]]]
ROW = st.lists(st.tuples(st.integers(0, 60_000), st.booleans()), min_size=1, max_size=9).map(
    lambda row: tuple(map(list, zip(*row, strict=True)))
)
ROWS = st.lists(ROW, min_size=1, max_size=5)


def digest_of(*steps: Rows) -> str:
    fed = Fed()
    for step in steps:
        for ids, learned in step:
            fed.row(ids, learned)
        fed.end_step()
    return fed.digest


@settings(deadline=None, max_examples=40)
@given(ROWS, ROWS)
def test_the_hash_depends_on_the_order_of_steps_but_not_of_rows_in_a_step(first: Rows, second: Rows) -> None:
    assert digest_of(first, second) == digest_of(first[::-1], second[::-1])
    if sorted(map(repr, first)) != sorted(map(repr, second)):
        assert digest_of(first, second) != digest_of(second, first)
    assert digest_of(first, second) != digest_of(first + second)


@settings(deadline=None, max_examples=40)
@given(ROW, st.data())
def test_another_id_or_target_gives_another_hash(row: tuple[list[int], list[bool]], data: st.DataObject) -> None:
    ids, learned = row
    index = data.draw(st.integers(0, len(ids) - 1))
    others = [[*ids[:index], ids[index] + 1, *ids[index + 1 :]], [*learned[:index], not learned[index], *learned[index + 1 :]]]
    assert len({row_digest(ids, learned), row_digest(others[0], learned), row_digest(ids, others[1])}) == 3


def test_the_hash_is_a_sha256_of_ids_and_targets() -> None:
    expected = hashlib.sha256(array("i", [7, 9]).tobytes() + b"\x00\x01").digest()
    assert row_digest([7, 9], [False, True]) == expected
    assert digest_of([([7, 9], [False, True])]) == hashlib.sha256(expected + b"|").hexdigest()[:16]


def test_a_step_is_counted_without_padding() -> None:
    fed = Fed()
    fed.row([1, 2, 3], [False, True, True])
    fed.row([4, 5], [False, True])
    assert fed.end_step() == {"rows": 2, "tokens": 5, "targets": 3, "squares": 13}
    assert fed.end_step() == {"rows": 0, "tokens": 0, "targets": 0, "squares": 0}


def test_peak_memory_is_in_bytes() -> None:
    assert 5 * 10**6 < peak_memory() < 10**11


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a peer that runs steps of one row, and fails after the fourth."""
    root = Path(__file__).parents[2]
    peers = tmp_path / "root/benchmarks/peers"
    peers.mkdir(parents=True)
    (peers / "turn.py").write_text((root / "benchmarks/peers/turn.py").read_text())
    (peers / "steps.py").write_text(
        "from benchmarks.peers.turn import Turn\n"
        "turn = Turn()\nturn.command('peak', lambda: {'peak_flops': 5.0})\nprint('noise')\nturn.between()\n"
        "for number in range(4):\n    turn.fed.row([number], [True])\n    turn.between(float(number))\nraise ValueError('out of rows')\n"
    )
    monkeypatch.setattr("benchmarks.client.ROOT", tmp_path / "root")
    return tmp_path / "work"


def test_a_trainer_runs_the_requested_steps_and_returns_their_measurements(peer: Path) -> None:
    trainer = TrainerProcess(sys.executable, "steps", {"batch": 1}, peer)
    try:
        trainer.wait_until_ready()
        assert json.loads((peer / "task.json").read_text()) == {"batch": 1}
        measured = trainer.run_steps(1)
        assert [step["loss"] for step in measured["steps"]] == [0.0]
        assert trainer.command("peak") == {"peak_flops": 5.0}
        measured = trainer.run_steps(2)
        assert [step["loss"] for step in measured["steps"]] == [1.0, 2.0]
        assert measured["seconds"] > 0 and measured["peak"] > 0
        assert measured["hash"] == digest_of(*[[([number], [True])] for number in range(3)])
        with pytest.raises(SystemFailed, match="out of rows"):
            trainer.run_steps(2)
    finally:
        trainer.close()


def test_the_time_to_a_step_starts_with_the_process(peer: Path) -> None:
    trainer = TrainerProcess(sys.executable, "steps", {}, peer)
    try:
        first, last, measured = trainer.time_start(1, 3)
        assert 0 < first <= last
        assert [step["loss"] for step in measured["steps"]] == [1.0, 2.0, 3.0]
        with pytest.raises(SystemFailed, match="out of rows"):
            trainer.finish()
    finally:
        trainer.close()
