from typing import Any

import pytest
from benchmarks.figures import Shape, compare, needed_flops, spread
from benchmarks.speed import rotate
from benchmarks.systems import SYSTEMS, select_systems
from benchmarks.table import speed_notes, speed_table
from hypothesis import given, settings
from hypothesis import strategies as st

STARTER = Shape(layers=30, hidden=576, inner=1536, heads=9, kv_heads=3, head_width=64, vocabulary=49_152)


def measured(*seconds: float, tokens: int = 100, digest: str = "aa", title: str = "t", tuned: bool = True) -> dict[str, Any]:
    step = {"rows": 1, "tokens": tokens, "targets": tokens // 4, "squares": tokens**2, "loss": 2.0}
    rounds = [{"seconds": each, "steps": [step], "hash": digest, "peak": 2 * 10**9} for each in seconds]
    return {"title": title, "tuned": tuned, "rounds": rounds}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.1, 100), min_size=1))
def test_a_median_is_within_its_range(values: list[float]) -> None:
    result = spread(values)
    assert result.low <= result.median <= result.high


def test_the_operations_of_the_starter_match_its_weights() -> None:
    trunk, head, adapters = 106_168_320, 28_311_552, 4_884_480
    assert sum(inputs * outputs for inputs, outputs in STARTER.matrices()) * 30 == trunk
    assert needed_flops(STARTER, tokens=1, targets=0, squares=0, rank=None) == 6 * trunk
    assert needed_flops(STARTER, tokens=0, targets=1, squares=0, rank=None) == 6 * head
    assert needed_flops(STARTER, tokens=1, targets=1, squares=0, rank=16) == 4 * trunk + 4 * head + 6 * adapters
    assert needed_flops(STARTER, tokens=0, targets=0, squares=4, rank=16) == 6 * 4 * 576 * 30


def test_a_ratio_compares_the_same_rows() -> None:
    """The rows of each round have other lengths, so the ratio compares round by round, not the best round with the worst."""
    result = compare({"ours": measured(1.0, 2.0, 4.0), "trl": measured(3.0, 6.0, 12.0)})
    assert result["systems"]["trl"]["times_as_fast"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert result["best_peer"] == "trl"


def test_a_failed_system_is_shown_with_its_error() -> None:
    systems = {"ours": measured(1.0), "litgpt": {"title": "litgpt", "tuned": True, "rounds": [], "error": "ended: no | module"}}
    result = compare(systems)
    assert result["systems"]["litgpt"]["error"] == "ended: no | module"
    table = speed_table(result)
    assert "ended: no / module" in table
    assert {line.count("|") for line in table.splitlines()} == {7}


def test_different_rows_are_reported_and_only_a_tuned_peer_is_the_best() -> None:
    slow, fast = measured(9.0, digest="bb"), measured(2.0, tuned=False)
    result = compare({"ours": measured(1.0), "trl": slow, "trl-default": fast, "plain": measured(1.5)})
    assert result["best_peer"] == "trl"
    assert not result["same_rows"]
    assert "NOT fed the same rows" in speed_notes(result)[-1]


def test_the_share_of_the_peak_is_operations_divided_by_time_and_peak() -> None:
    ours = measured(2.0) | {"peak_flops": 1e12}
    result = compare({"ours": ours}, shape=STARTER, rank=16)["systems"]["ours"]
    needed = needed_flops(STARTER, tokens=100, targets=25, squares=10_000, rank=16)
    assert result["share_of_peak"]["median"] == pytest.approx(needed / 2.0 / 1e12)
    assert "share_of_peak" not in compare({"ours": measured(2.0)}, shape=STARTER, rank=16)["systems"]["ours"]


def test_each_round_begins_with_another_system() -> None:
    names = ["a", "b", "c"]
    assert [rotate(names, number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(rotate(names, number)) == names for number in range(4))


def test_systems_are_selected_by_name_and_scenario() -> None:
    assert [each.name for each in select_systems("ours,trl-default", "docstrings", "lora")] == ["ours", "trl-default"]
    assert [each.name for each in select_systems("ours,trl-default", "rows-256", "lora")] == ["ours"]
    assert {each.name for each in SYSTEMS} >= {each.name for each in select_systems(None, "rows-2048", "full")}
    with pytest.raises(ValueError, match="no system is called unsloth"):
        select_systems("ours,unsloth", "docstrings", "lora")
