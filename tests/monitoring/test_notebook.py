"""A run in a notebook shows one output that is replaced."""

import pytest
from tests.support.summary import SUMMARY

from llamahome.monitoring.notebook import NotebookProgress, notebook


class FakeClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Shown:
    """What a notebook shows: the last text of each display, and how often each was replaced."""

    def __init__(self) -> None:
        self.texts: dict[str, dict[str, str]] = {}
        self.replaced = 0

    def __call__(self, data: dict[str, str], name: str, replace: bool) -> None:
        assert replace == (name in self.texts), "the first time it is made, later replaced"
        self.replaced += replace
        self.texts[name] = data

    @property
    def text(self) -> str:
        return "\n".join(data["text/plain"] for data in self.texts.values())


def test_a_notebook_shows_a_long_run_in_one_display_that_is_replaced_at_most_twice_a_second() -> None:
    clock, shown = FakeClock(), Shown()
    progress = NotebookProgress(shown, phases=2, now=clock)
    with progress.phase("data"):
        clock.seconds += 1.5
    progress.start(SUMMARY)
    before = shown.replaced
    for step in range(1, SUMMARY.horizon + 1):
        clock.seconds += 0.1
        progress.update(step, {"train/loss": 2.0 + step / 100})
    assert 1 <= shown.replaced - before <= 8, "3.6 seconds"
    progress.evaluated(SUMMARY.horizon, {"eval/loss": 2.5})
    progress.close()
    assert len(shown.texts) == 1
    assert "[1/2] data ... 1.5 s" in shown.text and f"step {SUMMARY.horizon} of {SUMMARY.horizon}" in shown.text
    assert "2.3600" in shown.text and "held-out 2.5000" in shown.text, "the last step is shown, however soon it came"


def test_a_notebook_keeps_every_line_and_text_stays_text() -> None:
    shown = Shown()
    progress = NotebookProgress(shown)
    lines = [f"line {number} <b>& more</b>" for number in range(450)]
    for line in lines:
        progress.say(line)
    with pytest.raises(ValueError, match="no"), progress.phase("model"):
        raise ValueError("no")
    assert [line for line in shown.text.splitlines() if line.startswith("line")] == lines
    assert "model ... failed after" in shown.text and len(shown.texts) == 3
    assert all("<b>" not in data["text/html"] and "&lt;b&gt;&amp; more" in data["text/html"] for data in list(shown.texts.values())[:2])


def test_what_is_no_notebook_gets_no_notebook_display() -> None:
    assert notebook() is None
