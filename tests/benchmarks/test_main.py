from pathlib import Path

import pytest
from benchmarks.__main__ import arguments, parts
from benchmarks.duration import message
from benchmarks.environments import missing


def _durations(*words: str) -> list[float]:
    return [part.seconds for part in parts(arguments(list(words)))]


def test_without_options_everything_is_measured_and_takes_about_an_hour() -> None:
    assert len(_durations()) == 6 + 3 + 1 + 1
    assert 45 < sum(_durations()) / 60 < 70


def test_fewer_parts_take_less_time() -> None:
    assert len(_durations("--part", "speed", "--scenario", "docstrings", "--method", "lora")) == 1
    assert sum(_durations("--part", "speed,quality")) < sum(_durations())
    assert sum(_durations("--part", "quality", "--rows", "8")) < sum(_durations("--part", "quality"))


@pytest.mark.parametrize("words", [("--part", "sped"), ("--systems", "ours,trll")])
def test_an_unknown_name_is_refused(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        arguments(list(words))


def test_the_first_message_names_the_environments_to_create(tmp_path: Path) -> None:
    assert missing(["ours", "trl", "litgpt"], tmp_path) == ["trl", "litgpt"]
    assert message(600, ["ours", "trl"], tmp_path) == "about 12 minutes on two idle cores, including new environments for trl"
    assert message(600, ["ours", "plain"], tmp_path) == "about 10 minutes on two idle cores"
