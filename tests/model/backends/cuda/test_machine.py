"""What a machine's GPU cannot do is said, or refused when it was asked for by name."""

import pytest
import torch
from tests.support.models import CPU, FP32

from llamahome.config.schema import Config, ModelConfig
from llamahome.errors import MachineError
from llamahome.model.backends import choose
from llamahome.model.backends.choose import backend_of, choose_backend, low_precision, overlooked

OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.\nmore lines"


def with_driver(monkeypatch: pytest.MonkeyPatch, told: str | None) -> None:
    """A torch built for CUDA on a machine whose driver says that."""

    def start() -> None:
        if told is not None:
            raise RuntimeError(told)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", start)


@pytest.mark.parametrize("told", [OLD, None], ids=["old driver", "hidden"])
def test_a_gpu_that_is_not_there_is_refused_when_asked_for_by_name(told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, told)
    with pytest.raises(MachineError) as caught:
        choose_backend(Config(model=ModelConfig(backend="cuda")), CPU)
    (problem,) = caught.value.problems
    assert problem.code == "model.backend-missing" and caught.value.exit_status == 4
    assert ("driver on your system is too old" if told else "CUDA_VISIBLE_DEVICES") in problem.message


def test_a_gpu_that_torch_cannot_use_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, OLD)
    line = overlooked(Config(), CPU)
    assert line is not None and line.startswith("the GPU is not used, the processor is: The NVIDIA driver") and "\n" not in line
    assert overlooked(Config(model=ModelConfig(backend="cpu")), CPU) is None


@pytest.mark.parametrize("told", ["Found no NVIDIA driver on your system.", "No CUDA GPUs are available", None])
def test_a_machine_without_a_gpu_is_told_nothing(told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, told)
    assert overlooked(Config(), CPU) is None


def test_a_gpu_without_bfloat16_computes_in_float32_and_refuses_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    low = low_precision(torch.device("cuda", 0))
    assert not low.there and low.reason == "this GPU has no bfloat16 products"
    assert choose.choose_precision(Config(), low).compute == torch.float32
    with pytest.raises(MachineError, match="no bfloat16"):
        choose.choose_precision(Config.model_validate({"training": {"mixed_precision": "bf16"}}), low)


def test_short_runs_are_not_compiled_and_long_ones_are() -> None:
    backend = backend_of("cuda", CPU, FP32)
    assert not backend.wins_back(100_000, weights=1_200_000_000, processes=1)
    assert backend.wins_back(20_000_000, weights=1_200_000_000, processes=1)
    assert not backend.wins_back(20_000_000, weights=1_200_000_000, processes=64)
    assert "compiles" in backend.compile_costs


def test_part_times_on_a_processor_are_those_of_the_wall() -> None:
    backend = backend_of("cuda", CPU, FP32)
    first, second = backend.mark(), backend.mark()
    assert 0 <= backend.seconds_between(first, second) < 60
