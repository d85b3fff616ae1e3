from typing import Any

import pytest
from benchmarks.figures import Shape, compared, needed_flops, spread
from benchmarks.speed import rotated
from benchmarks.systems import SYSTEMS, chosen
from benchmarks.table import speed_table, speed_words
from hypothesis import given, settings
from hypothesis import strategies as st

STARTER = Shape(layers=30, hidden=576, inner=1536, heads=9, kv_heads=3, head_width=64, vocabulary=49_152)


def measured(*seconds: float, tokens: int = 100, digest: str = "aa", title: str = "t", tuned: bool = True) -> dict[str, Any]:
    step = {"rows": 1, "tokens": tokens, "targets": tokens // 4, "squares": tokens**2, "loss": 2.0}
    rounds = [{"seconds": each, "steps": [step], "hash": digest, "peak": 2 * 10**9} for each in seconds]
    return {"title": title, "tuned": tuned, "rounds": rounds}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.1, 100), min_size=1))
def test_a_median_lies_in_its_range(values: list[float]) -> None:
    found = spread(values)
    assert found.low <= found.median <= found.high


def test_the_arithmetic_of_the_starter_is_that_of_its_weights() -> None:
    trunk, head, adapters = 106_168_320, 28_311_552, 4_884_480
    assert sum(inputs * outputs for inputs, outputs in STARTER.matrices()) * 30 == trunk
    assert needed_flops(STARTER, tokens=1, targets=0, squares=0, rank=None) == 6 * trunk
    assert needed_flops(STARTER, tokens=0, targets=1, squares=0, rank=None) == 6 * head
    assert needed_flops(STARTER, tokens=1, targets=1, squares=0, rank=16) == 4 * trunk + 4 * head + 6 * adapters
    assert needed_flops(STARTER, tokens=0, targets=0, squares=4, rank=16) == 6 * 4 * 576 * 30


def test_a_ratio_is_that_of_the_same_rows() -> None:
    """Rounds have rows of other lengths: what is compared is one round of each, not the best of one with the worst of the other."""
    told = compared({"ours": measured(1.0, 2.0, 4.0), "trl": measured(3.0, 6.0, 12.0)})
    assert told["systems"]["trl"]["times_as_fast"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert told["best_peer"] == "trl"


def test_a_system_that_failed_is_told_and_stops_no_other() -> None:
    systems = {"ours": measured(1.0), "litgpt": {"title": "litgpt", "tuned": True, "rounds": [], "error": "ended: no | module"}}
    told = compared(systems)
    assert told["systems"]["litgpt"]["error"] == "ended: no | module"
    table = speed_table(told)
    assert "ended: no / module" in table
    assert {line.count("|") for line in table.splitlines()} == {7}


def test_other_rows_are_told_and_only_tuned_peers_are_the_ones_to_beat() -> None:
    slow, fast = measured(9.0, digest="bb"), measured(2.0, tuned=False)
    told = compared({"ours": measured(1.0), "trl": slow, "trl-default": fast, "plain": measured(1.5)})
    assert told["best_peer"] == "trl"
    assert not told["same_rows"]
    assert "NOT fed the same rows" in speed_words(told)[-1]


def test_the_share_of_the_peak_is_what_the_rows_need_in_the_time_they_took() -> None:
    ours = measured(2.0) | {"peak_flops": 1e12}
    told = compared({"ours": ours}, shape=STARTER, rank=16)["systems"]["ours"]
    needed = needed_flops(STARTER, tokens=100, targets=25, squares=10_000, rank=16)
    assert told["share_of_peak"]["median"] == pytest.approx(needed / 2.0 / 1e12)
    assert "share_of_peak" not in compared({"ours": measured(2.0)}, shape=STARTER, rank=16)["systems"]["ours"]


def test_in_each_round_another_system_begins() -> None:
    names = ["a", "b", "c"]
    assert [rotated(names, number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(rotated(names, number)) == names for number in range(4))


def test_systems_are_chosen_by_name_and_scenario() -> None:
    assert [each.name for each in chosen("ours,trl-default", "docstrings", "lora")] == ["ours", "trl-default"]
    assert [each.name for each in chosen("ours,trl-default", "rows-256", "lora")] == ["ours"]
    assert {each.name for each in SYSTEMS} >= {each.name for each in chosen(None, "rows-2048", "full")}
    with pytest.raises(ValueError, match="no system is called unsloth"):
        chosen("ours,unsloth", "docstrings", "lora")
