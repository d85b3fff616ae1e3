"""Steps over labelled answers, with their reference points, are the same on one and on two processes."""

from pathlib import Path

import pytest
from tests.support.models import save_tiny
from tests.support.runs import ALONE
from tests.support.workers import run_workers
from tests.training.label_ranks import three_steps

from llamahome.training.labelled import MEASURED


@pytest.mark.medium
def test_any_number_of_processes_learns_the_same_from_labelled_answers(tmp_path: Path) -> None:
    payload = {"base": str(save_tiny(tmp_path / "tiny", "llama"))}
    alone = three_steps(ALONE, payload)
    points = [step[2 + MEASURED.index("reference_point")] for step in alone]
    assert points[0] == 0 and points[1] != points[2] and min(points[1:]) > 0
    for rank in run_workers("tests/training/label_ranks.py:three_steps", 2, payload, timeout=120):
        for step, expected in zip(rank, alone, strict=True):
            assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
