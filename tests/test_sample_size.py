"""The sample takes at most its time on any machine; the number type of a run is the one that is measured."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.config.load import load_config
from llamahome.sample_size import rows_within, size_sample

given_machine = {"rate": st.floats(1e9, 1e15), "full": st.booleans(), "epochs": st.floats(0.1, 20)}


@settings(deadline=None)
@given(**given_machine, seconds=st.floats(1, 1000))
def test_it_takes_at_most_that_long_or_is_the_smallest(seconds: float, rate: float, full: bool, epochs: float) -> None:
    sized = rows_within(seconds, rate=rate, full=full, epochs=lambda _: epochs)
    assert 96 <= sized.rows <= 400 and sized.rows % 8 == 0
    assert sized.seconds <= seconds * (1 + 1e-9) or sized.rows == 96
    assert sized.rows == 400 or sized.seconds / sized.rows * (sized.rows + 8) >= seconds * (1 - 1e-9), "it could be larger"


@settings(deadline=None)
@given(**given_machine, faster=st.floats(1, 10))
def test_a_faster_machine_gets_no_fewer_rows(rate: float, full: bool, epochs: float, faster: float) -> None:
    slow, fast = (rows_within(150, rate=each, full=full, epochs=lambda _: epochs).rows for each in (rate, rate * faster))
    assert slow <= fast


@pytest.mark.parametrize(
    ("rate", "rows", "tokens_per_s"),
    [(130e9, 104, (150, 190)), (0.6e12, 400, (600, 1400)), (20e9, 96, (20, 30)), (400e12, 400, (1e5, 1e6))],
)
def test_the_machines_that_were_measured(rate: float, rows: int, tokens_per_s: tuple[float, float]) -> None:
    sized = rows_within(150, rate=rate, full=False, epochs=lambda _: 1)
    assert sized.rows == rows and tokens_per_s[0] < sized.tokens_per_s < tokens_per_s[1]


@pytest.mark.parametrize("setting", ["auto", "no"])
def test_the_type_of_a_run_is_measured_and_the_estimate_is_shown(tmp_path: Path, setting: str) -> None:
    loaded = load_config(assignments=[f"training.mixed_precision={setting}"], environment={}, folder=tmp_path)
    lines: list[str] = []
    sized = size_sample(loaded, say=lines.append)
    (line,) = lines
    types = ("float32", "bfloat16") if setting == "auto" else ("float32",)  # two races on a busy machine may differ
    assert any(f"({name} products at " in line for name in types) and f"training on {sized.rows} rows takes about " in line
    assert ("--rows 400 writes more" in line) == (sized.rows < 400)


@given(rate=st.floats(1e9, 1e15), passes=st.lists(st.integers(1, 12), min_size=2, max_size=2), edge=st.integers(96, 400))
def test_passes_that_depend_on_the_rows_are_counted(rate: float, passes: list[int], edge: int) -> None:
    sized = rows_within(150, rate=rate, full=False, epochs=lambda rows: passes[rows >= edge])
    alone = rows_within(150, rate=rate, full=False, epochs=lambda _: passes[sized.rows >= edge])
    assert sized.seconds == pytest.approx(alone.seconds / alone.rows * sized.rows)
    assert sized.seconds <= 150 or sized.rows == 96
