"""Columns of metrics: they grow with the file, start again with another one, and keep every spike when they are thinned."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.dashboards import append, lines, records

from llamahome.dashboard.curves import Curves, moving_average


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_a_file_is_read_once_and_then_what_it_gains(path: Path) -> None:
    path.write_text(lines(records(4)))
    curves = Curves(path)
    curves.update()
    append(path, records(2, first=5))
    with path.open("a") as file:
        file.write('{"step": 7, "train/l')
    curves.update()
    line = curves.lines(["train/loss"], "step", points=100)["train/loss"]
    assert line.x == [1, 2, 3, 4, 5, 6] and curves.count("train/loss") == 6
    with path.open("a") as file:
        file.write('oss": 9}\nnot json\n')
    curves.update()
    assert curves.last("train/loss") == 9 and curves.damaged == 1 and curves.generation == 0


@pytest.mark.parametrize("content", [lines(records(2)), ""])
def test_a_file_that_became_shorter_or_another_one_is_read_from_its_beginning(path: Path, content: str) -> None:
    path.write_text(lines(records(9)))
    curves = Curves(path)
    curves.update()
    path.write_text(content)
    curves.update()
    assert curves.generation == 1 and curves.count("train/loss") == content.count("train/loss")
    path.unlink()
    curves.update()
    assert curves.names == []


def test_missing_metrics_and_values_that_were_not_finite_are_not_the_same(path: Path) -> None:
    path.write_text(lines([{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 2.0, "b": True, "c": "x"}]))
    curves = Curves(path)
    curves.update()
    line = curves.lines(["a", "unknown"], "step", points=100)
    assert list(line) == ["a"] and (line["a"].x, line["a"].y) == ([1, 2, 4], [1.0, None, 2.0])
    assert curves.names == ["a"]


def test_a_curve_lies_along_steps_tokens_or_time(path: Path) -> None:
    path.write_text(lines(records(20)))
    curves = Curves(path)
    curves.update()
    places = {axis: curves.lines(["eval/loss"], axis, points=9)["eval/loss"].x for axis in ("step", "tokens", "time")}
    assert places == {"step": [0, 10, 20], "tokens": [0, 1000, 2000], "time": [0, 10.5, 20.5]}
    assert curves.place_of_step(10, "tokens") == 1000 and curves.place_of_step(99, "step") == 20


def test_samples_of_the_machine_lie_between_the_records_around_them(path: Path, tmp_path: Path) -> None:
    path.write_text(lines({"t": 100.0 + 10 * step, "step": step, "train/tokens": 5 * step} for step in range(3)))
    system = tmp_path / "system.jsonl"
    system.write_text(lines({"t": at, "cpu": at} for at in (95.0, 105.0, 110.0, 125.0)))
    run, machine = Curves(path), Curves(system)
    run.update()
    machine.update()
    assert run.lines_of_times(machine, ["cpu"], "step", points=9)["cpu"].x == [0.5, 1]
    assert run.lines_of_times(machine, ["cpu"], "tokens", points=9)["cpu"].x == [2.5, 5]
    assert run.lines_of_times(machine, ["cpu"], "time", points=9)["cpu"].x == [-5, 5, 10, 25]


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.floats(0.1, 100), min_size=30, max_size=400), points=st.integers(10, 60))
def test_the_lowest_and_the_highest_value_survive_thinning(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], points: int
) -> None:
    path = tmp_path_factory.mktemp("thin") / "metrics.jsonl"
    path.write_text(lines({"t": 1.0, "step": step, "a": value, "b": 1.0} for step, value in enumerate(values)))
    curves = Curves(path)
    curves.update()
    shown = curves.lines(["a"], "step", points=points)["a"].y
    assert math.isclose(min(shown), min(values), rel_tol=1e-5) and math.isclose(max(shown), max(values), rel_tol=1e-5)
    together = curves.lines(["a", "b"], "step", points=points, together=True)
    assert together["a"].x == together["b"].x and math.isclose(max(together["a"].y), max(values), rel_tol=1e-5)


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=50), weight=st.floats(0.01, 0.99))
def test_a_smoothed_curve_is_the_weighted_mean_of_all_values_before(values: list[float], weight: float) -> None:
    shares = [weight ** (len(values) - 1 - at) for at in range(len(values))]
    expected = sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)
    assert math.isclose(moving_average(values, weight)[-1], expected, rel_tol=1e-6, abs_tol=1e-9)
    assert moving_average([*values, math.nan], weight)[-1] == moving_average(values, weight)[-1]


def test_the_first_look_at_a_long_file_shows_the_losses_that_reading_it_shows(path: Path) -> None:
    content = records(500)
    content[20]["train/loss"] = None
    path.write_text(lines(content))
    assert Curves(path).first_losses(60) is None, "the file is short"
    curves = Curves(path, large=1000)
    early = curves.first_losses(60)
    curves.update()
    whole = curves.lines(["train/loss"], "step", points=60)["train/loss"]
    assert (early.x, early.y) == (whole.x, whole.y) and None in early.y
    assert curves.first_losses(60) is None, "the file has been read"


def test_the_best_value_is_the_earlier_of_equal_ones(path: Path) -> None:
    path.write_text(lines({"step": step, "a": value} for step, value in enumerate([3.0, 1.0, 2.0, 1.0, 3.0])))
    curves = Curves(path)
    curves.update()
    assert curves.best("a", lowest=True) == (1, 1.0) and curves.best("a", lowest=False) == (0, 3.0)
    assert curves.best("b", lowest=True) is None


def test_the_pace_is_that_of_the_newest_steps(path: Path) -> None:
    path.write_text("".join(json.dumps({"t": t, "step": step, "train/loss": 1.0}) + "\n" for step, t in enumerate([0, 100, 101, 102])))
    curves = Curves(path)
    curves.update()
    assert curves.seconds_per_step(newest=3) == 1.0
