"""A step and an evaluation over two processes are those of one; what is not finite on one of them is refused on both."""

from pathlib import Path

import pytest
import torch
from tests.support.models import save_tiny
from tests.support.runs import ALONE
from tests.support.workers import run_workers
from tests.training.ranks import three_steps


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_train_like_one(tmp_path: Path, method: str) -> None:
    payload = {"base": str(save_tiny(tmp_path, "llama", vocab_size=320)), "method": method}
    first, second = run_workers("tests/training/ranks.py:three_steps", 2, payload)
    assert repr(first) == repr(second), "the processes have drifted apart"
    alone = three_steps(ALONE, payload)
    assert [refused for *_, refused in first["steps"]] == [refused for *_, refused in alone["steps"]] == [0, 1, 0]
    for number in (0, 2):
        assert first["steps"][number] == pytest.approx(alone["steps"][number], rel=1e-6)
    found, expected = torch.tensor(first["weights"]), torch.tensor(alone["weights"])
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert first["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-6)
