"""A step over two ranks equals that of one; a loss that is not finite, or memory that runs out, on one rank counts for both."""

from pathlib import Path

import pytest
import torch
from tests.support.models import save_tiny
from tests.support.runs import ALONE
from tests.support.workers import run_workers
from tests.training.ranks import three_steps, three_steps_each


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.medium)])
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


@pytest.mark.medium
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_optimizer_trains_on_several_processes_as_on_one(tmp_path: Path, size: int) -> None:
    optimizers = [("adamw_8bit", "full"), ("adafactor", "full"), ("adafactor", "lora"), ("muon", "full")]
    payload = {"base": str(save_tiny(tmp_path, "llama", vocab_size=320)), "optimizers": optimizers}
    found = run_workers("tests/training/ranks.py:three_steps_each", size, payload)
    assert len({repr(each) for each in found}) == 1, "the processes have drifted apart"
    for one, alone, name in zip(found[0], three_steps_each(ALONE, payload), optimizers, strict=True):
        assert [refused for *_, refused in one["steps"]] == [0, 1, 0]
        weights, expected = torch.tensor(one["weights"]), torch.tensor(alone["weights"])
        assert (weights - expected).norm() <= 1e-5 * expected.norm(), name


PLACES = ("forward", "layer", "head", "backward", "update")
COLLECTIVES = ("gather 1", "gather 3", "gather backward 1", "gather backward 3", "scatter backward 1", "scatter backward 4")
"""Where a rank allocates memory for an exchange that the others wait in: which of them in a pass. Gathers ask for two tensors."""


@pytest.mark.medium
@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("shard", "full"),
        ("overlapped", "full"),
        pytest.param("shard", "lora", marks=pytest.mark.slow),
        pytest.param("flat", "lora", marks=pytest.mark.slow),
    ],
)
def test_when_memory_runs_out_on_one_process_all_do_the_step_again(tmp_path: Path, strategy: str, method: str) -> None:
    """Wherever it happens, and where processes wait for each other within a pass, too."""
    payload = {"base": str(save_tiny(tmp_path, "llama")), "folder": str(tmp_path), "strategy": strategy, "method": method, "rank": 1}
    places = PLACES + (COLLECTIVES if strategy == "shard" and method == "full" else COLLECTIVES[:4] if strategy == "shard" else ())
    cases = [{"within": "forward", "room": 10**6}, *({"within": place, "room": 35} for place in places)]
    ranks = run_workers("tests/training/ranks.py:short_of_memory_each", 2, {**payload, "cases": cases}, timeout=300)
    roomy, *_ = ranks[0]
    assert roomy["warnings"] == [] and roomy["budget"] == 60
    for first, second, place in zip(ranks[0][1:], ranks[1][1:], places, strict=True):
        assert {**first, "weights": None} == {**second, "weights": None} and first["step"] == 5, place
        assert (first["weights"] == second["weights"]) is ((strategy, method) != ("shard", "full")), "the same weights, or rows of them"
        assert first["budget"] <= 30 and set(map(tuple, first["short"])) == {(1,)}, place
        assert all("memory ran out on process 1 with" in warning for warning in first["warnings"])
        for found, expected in ((first, ranks[0][0]), (second, ranks[1][0])):
            one, other = torch.tensor(found["weights"]), torch.tensor(expected["weights"])
            assert (one - other).norm() <= 1e-6 * other.norm(), place


@pytest.mark.medium
@pytest.mark.parametrize("lasting", [False, True])
def test_what_one_process_spoils_all_refuse_in_that_step(tmp_path: Path, lasting: bool) -> None:
    payload = {"base": str(save_tiny(tmp_path, "llama")), "folder": str(tmp_path), "lasting": lasting}
    first, second = run_workers("tests/training/ranks.py:harmed", 2, payload, timeout=300)
    assert first == second, "the processes have drifted apart"
    steps, reasons = zip(*first["bad"], strict=True)
    assert list(steps) == [21, 25, *([28, 29, 30] if lasting else [])]
    assert "not finite" in reasons[0] and all("leaps" in reason for reason in reasons[1:])
    assert first["ended"] == ([28, 29, 30] if lasting else "finished")
