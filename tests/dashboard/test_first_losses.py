"""The quick look at the losses finds what reading every record finds, wherever a block ends, and says so where it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.dashboards import lines, records

from llamahome.dashboard.first_losses import read_losses
from llamahome.monitoring.series import thin

LOSSES = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 12)


@settings(deadline=None, max_examples=60)
@given(
    losses=st.lists(LOSSES | st.just(2.5), max_size=60) | st.lists(st.floats(1, 9.99), max_size=60),
    block=st.integers(1, 500),
    cut=st.integers(0, 90),
)
def test_every_loss_of_a_whole_line_is_found_with_its_step(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float | None], block: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("losses") / "metrics.jsonl"
    content: list[dict[str, Any]] = [{"t": 0.5, "step": 0, "eval/loss": 9.0}]
    for step, loss in enumerate(losses, start=1):
        content.append({"t": step + 0.5, "step": step, "train/loss": loss, "train/grad_norm": 2.0})
        if step % 5 == 0:
            content.append({"t": step + 0.7, "step": step, "eval/loss": 9.0})
    text = lines(content)
    path.write_text(text[: len(text) - cut])
    whole = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    expected = [(record["step"], record["train/loss"]) for record in whole if "train/loss" in record]
    found, thinned = (read_losses(path, points, block_bytes=block) for points in (1000, 8))
    if not expected:
        assert found is None and thinned is None
        return
    assert found is not None and list(zip(*found, strict=True)) == expected
    assert thinned == thin([step for step, _ in expected], [loss for _, loss in expected], 8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"train/loss": 2.5, ', '"train/loss": "high", ', 1),
        lambda text: text.replace('"train/loss": 2.5, ', '"train/loss": 2.', 1),
        lambda text: text.replace(", ", ",").replace(": ", ":"),
        lambda text: text.replace("train/", "other/"),
    ],
    ids=["no number", "torn in the middle", "written by another program", "no losses"],
)
def test_what_the_recorder_does_not_write_has_to_be_read_record_by_record(tmp_path: Path, damage: Any) -> None:
    content = records(30)
    content[7]["train/loss"] = 2.5
    (tmp_path / "metrics.jsonl").write_text(damage(lines(content)))
    assert read_losses(tmp_path / "metrics.jsonl", 100) is None


def test_a_file_that_is_missing_has_no_losses(tmp_path: Path) -> None:
    assert read_losses(tmp_path / "metrics.jsonl", 100) is None
