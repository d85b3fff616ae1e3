"""Steps over pairs of answers, their reference and their evaluation are the same on one, two and three processes."""

from pathlib import Path

import pytest
from tests.support.models import save_tiny
from tests.support.runs import ALONE
from tests.support.workers import run_workers
from tests.training.pair_ranks import two_steps


@pytest.mark.medium
@pytest.mark.parametrize(("size", "strategies"), [(2, ["replicate"]), pytest.param(3, ["replicate", "shard"], marks=pytest.mark.slow)])
def test_any_number_of_processes_learns_the_same_from_pairs(tmp_path: Path, size: int, strategies: list[str]) -> None:
    payload = {"base": str(save_tiny(tmp_path / "tiny", "llama")), "method": "lora", "folder": str(tmp_path / "one")}
    alone = two_steps(ALONE, {**payload, "strategies": ["replicate"]})["replicate"]
    assert alone["steps"][0][0] != alone["steps"][1][0] and alone["evaluation"][2] == 5
    task = "tests/training/pair_ranks.py:two_steps"
    ranks = run_workers(task, size, {**payload, "strategies": strategies, "folder": str(tmp_path / "many")}, timeout=120)
    for rank in ranks:
        for strategy in strategies:
            found = rank[strategy]
            assert found["reference"] == pytest.approx(alone["reference"], rel=1e-5)
            for step, expected in zip(found["steps"], alone["steps"], strict=True):
                assert step == pytest.approx(expected, rel=1e-4, abs=1e-5), strategy
            assert found["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-4)
