"""A step over two ranks equals that of one; a loss that is not finite, or memory that runs out, on one rank counts for both."""

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


@pytest.mark.parametrize(
    ("strategy", "method", "within", "room"),
    [("flat", "lora", "backward", 35), ("overlapped", "full", "backward", 45), ("overlapped", "full", "forward", 35)],
)
def test_when_memory_runs_out_on_one_process_all_do_the_step_again(
    tmp_path: Path, strategy: str, method: str, within: str, room: int
) -> None:
    payload = {"base": str(save_tiny(tmp_path, "llama")), "folder": str(tmp_path), "strategy": strategy, "method": method}
    cases = [{"within": within, "rank": 1, "room": each} for each in (10**6, room)]
    (roomy, _), (first, second) = (
        run_workers("tests/training/ranks.py:short_of_memory", 2, {**payload, **each}, timeout=120) for each in cases
    )
    assert first == second, "the processes have drifted apart"
    assert roomy["warnings"] == [] and roomy["budget"] == 60 and roomy["step"] == first["step"] == 5
    assert first["budget"] <= room and all("memory ran out on process 1 with" in warning for warning in first["warnings"])
    found, expected = torch.tensor(first["weights"]), torch.tensor(roomy["weights"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("within", ["forward", "backward"])
def test_where_processes_wait_within_a_pass_the_one_whose_memory_ran_out_is_named(tmp_path: Path, within: str) -> None:
    payload = {"base": str(save_tiny(tmp_path, "llama")), "folder": str(tmp_path), "strategy": "shard", "method": "lora"}
    first, second = run_workers(
        "tests/training/ranks.py:short_of_memory", 2, {**payload, "within": within, "rank": 1, "room": 35}, timeout=120
    )
    assert "error[training.out-of-memory]" in second["error"] and "of process 1" in second["error"]
    assert "training.micro_batch_tokens=" in second["error"]
    assert "error[distributed.peer-lost]" in first["error"]
