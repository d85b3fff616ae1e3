from pathlib import Path

import pytest
from benchmarks.__main__ import arguments, parts
from benchmarks.duration import told
from benchmarks.environments import missing


def _asked(*words: str) -> list[float]:
    return [part.seconds for part in parts(arguments(list(words)))]


def test_without_a_word_everything_is_measured_and_takes_about_an_hour() -> None:
    assert len(_asked()) == 6 + 3 + 1 + 1
    assert 45 < sum(_asked()) / 60 < 70


def test_less_is_measured_in_less_time() -> None:
    assert len(_asked("--part", "speed", "--scenario", "docstrings", "--method", "lora")) == 1
    assert sum(_asked("--part", "speed,quality")) < sum(_asked())
    assert sum(_asked("--part", "quality", "--rows", "8")) < sum(_asked("--part", "quality"))


@pytest.mark.parametrize("words", [("--part", "sped"), ("--systems", "ours,trll")])
def test_a_word_that_nothing_is_called_is_refused_before_anything_is_measured(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        arguments(list(words))


def test_environments_that_must_be_made_are_told_in_advance(tmp_path: Path) -> None:
    assert missing(["ours", "trl", "litgpt"], tmp_path) == ["trl", "litgpt"]
    assert told(600, ["ours", "trl"], tmp_path) == "about 12 minutes on two idle cores, with environments to make for trl"
    assert told(600, ["ours", "plain"], tmp_path) == "about 10 minutes on two idle cores"
