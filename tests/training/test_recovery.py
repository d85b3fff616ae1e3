"""Memory that runs out becomes an error that says what mends it; flags are read late and lose nothing."""

import pytest
import torch
from tests.support.runs import ALONE

from llamahome.config.schema import Config
from llamahome.distributed.devices import is_out_of_memory
from llamahome.distributed.world import World
from llamahome.errors import OutOfMemory
from llamahome.pass_memory import remedies_of
from llamahome.training.memory import Remedies, free_cached_memory, smaller_budget, update_does_not_fit
from llamahome.training.recovery import BadSteps, RunDiverged


def too_much() -> None:
    torch.empty(2**62, dtype=torch.uint8)


def of_python() -> None:
    raise MemoryError


def of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines")


def on_windows() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")


def test_an_accelerator_gives_its_spare_blocks_back_before_a_step_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: given.append(1))
    free_cached_memory()
    assert given == [1]


TROUBLES = pytest.mark.parametrize("trouble", [too_much, of_python, of_a_gpu, on_windows])


def message_of(trouble) -> str:
    try:
        trouble()
    except (MemoryError, RuntimeError) as error:
        assert is_out_of_memory(error)
        return str(error)
    raise AssertionError("there was no trouble")


KEEPS = Remedies(recompute=True)


def budget_after(message: str, lengths, *, budget: int = 2048, others_wait: bool = False, remedies: Remedies = KEEPS) -> int:
    return smaller_budget(message, budget, lengths, world=ALONE, others_wait=others_wait, remedies=remedies).micro_batch_tokens


def test_after_running_out_of_memory_a_step_is_cut_into_halves() -> None:
    assert budget_after("no more", [(600, 500), (1000,)]) == 550
    assert budget_after("no more", [(1400, 600), (300, 300)]) == 1000
    assert budget_after("no more", [(1, 1)], budget=2) == 1


@TROUBLES
@pytest.mark.parametrize(("lengths", "wait", "smaller"), [([(900,), (40,)], False, "data.max_length=450"), ([(600, 500)], True, "=550")])
def test_what_cannot_be_halved_here_says_what_mends_it(trouble, lengths, wait: bool, smaller: str) -> None:
    with pytest.raises(OutOfMemory) as error:
        budget_after(message_of(trouble) or "no more memory", lengths, others_wait=wait)
    (problem,) = error.value.problems
    assert error.value.exit_status == 5 and problem.code == "training.out-of-memory"
    assert "tokens does not fit" in problem.message and "\n" not in problem.message
    assert smaller in problem.hint and "gradient_checkpointing=true" in problem.hint


def test_help_names_only_what_would_help_the_run() -> None:
    cases = [
        ({}, 400, "--set data.max_length=200"),
        ({"training": {"objective": "dpo"}}, 800, "--set data.max_length=200"),
        ({"training": {"objective": "grpo"}, "grpo": {"max_new_tokens": 96}}, 400, "--set grpo.max_new_tokens=48"),
    ]
    for values, longest, expected in cases:
        config = Config.model_validate({**values, "training": {"gradient_checkpointing": True, **values.get("training", {})}})
        with pytest.raises(OutOfMemory) as error:
            budget_after("no more memory", [(longest,)], remedies=remedies_of(config))
        assert error.value.problems[0].hint == expected and error.value.problems[0].where in expected


@TROUBLES
def test_memory_that_runs_out_after_the_passes_says_what_takes_less(trouble) -> None:
    try:
        trouble()
    except (MemoryError, RuntimeError) as error:
        (problem,) = update_does_not_fit(error, world=World(1, 3, 1, ALONE.device)).problems
    assert problem.code == "training.out-of-memory" and "of process 1" in problem.message and "\n" not in problem.message
    assert "--method lora" in problem.hint and "--world-size 6 --set distributed.strategy=shard" in problem.hint


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(OSError("no space left on device"))


def note(bad: BadSteps, flags: str, first: int = 1) -> None:
    for number, flag in enumerate(flags, first):
        bad.note(number, (4 * number, 4 * number + 4), torch.tensor(float(flag == "x")))


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize(
    ("flags", "diverged"), [("..x.xx.x", False), ("xx.xx.xx", False), (".xxx....", True), ("......xx", False), (".....xxx", True)]
)
def test_rows_of_bad_steps_are_found_wherever_they_are_read(flags: str, diverged: bool, cut: int) -> None:
    bad, found = BadSteps(most_in_row=3, total=10), {}
    for begin in range(0, len(flags), cut):
        note(bad, flags[begin : begin + cut], begin + 1)
        bad.cut()
        found |= bad.read()
    expected = {number: (4 * number, 4 * number + 4) for number, flag in enumerate(flags, 1) if flag == "x"}
    assert {step: each.positions for step, each in found.items()} == expected and bad.total == 10 + len(found)
    assert bad.read() == {}
    if not diverged:
        bad.raise_if_diverged([], "nothing")
        return
    with pytest.raises(RunDiverged) as error:
        bad.raise_if_diverged([f"rows.jsonl:{n}" for n in range(20)], "llamahome train-resume latest")
    (problem,) = error.value.problems
    assert error.value.streak is not None
    streak = [step for step, _ in error.value.streak.steps]
    assert flags[streak[0] - 1 : streak[-1]] == "xxx" and (error.value.streak.before or (0,))[0] == streak[0] - 1
    assert error.value.exit_status == 6 and problem.code == "training.diverged" and "llamahome train-resume latest" in problem.hint
    assert "rows.jsonl:7" in problem.message and "rows.jsonl:8" not in problem.message
