"""A GPU that cannot be used is reported, and refused if the config requests it."""

import pytest
import torch
from tests.support.models import CPU, FP32

from llamahome.config.schema import Config, ModelConfig
from llamahome.errors import MachineError
from llamahome.model.backends import choose
from llamahome.model.backends.choose import backend_of, choose_backend, low_precision, unused_gpu_note

OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.\nmore lines"


def with_driver(monkeypatch: pytest.MonkeyPatch, message: str | None) -> None:
    """A torch built for CUDA, whose initialization fails with `message`, or succeeds."""

    def start() -> None:
        if message is not None:
            raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", start)


@pytest.mark.parametrize("message", [OLD, None], ids=["old driver", "hidden"])
def test_a_missing_gpu_is_refused_if_it_is_requested(message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, message)
    with pytest.raises(MachineError) as caught:
        choose_backend(Config(model=ModelConfig(backend="cuda")), CPU)
    (problem,) = caught.value.problems
    assert problem.code == "model.backend-missing" and caught.value.exit_status == 4
    assert ("driver on your system is too old" if message else "CUDA_VISIBLE_DEVICES") in problem.message


def test_a_gpu_that_torch_cannot_use_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, OLD)
    line = unused_gpu_note(Config(), CPU)
    assert line is not None and line.startswith("the GPU is not used, the processor is: The NVIDIA driver") and "\n" not in line
    assert unused_gpu_note(Config(model=ModelConfig(backend="cpu")), CPU) is None


@pytest.mark.parametrize("message", ["Found no NVIDIA driver on your system.", "No CUDA GPUs are available", None])
def test_a_machine_without_a_gpu_gets_no_note(message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, message)
    assert unused_gpu_note(Config(), CPU) is None


def test_a_gpu_without_bfloat16_computes_in_float32_and_refuses_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    low = low_precision(torch.device("cuda", 0))
    assert not low.there and low.reason == "this GPU has no bfloat16 products"
    assert choose.choose_precision(Config(), low).compute == torch.float32
    with pytest.raises(MachineError, match="no bfloat16"):
        choose.choose_precision(Config.model_validate({"training": {"mixed_precision": "bf16"}}), low)


def test_short_runs_are_not_compiled_and_long_ones_are() -> None:
    backend = backend_of("cuda", CPU, FP32)
    assert not backend.compile_pays_off(100_000, weights=1_200_000_000, processes=1)
    assert backend.compile_pays_off(20_000_000, weights=1_200_000_000, processes=1)
    assert not backend.compile_pays_off(20_000_000, weights=1_200_000_000, processes=64)
    assert "compiles" in backend.compile_note


def test_timestamps_on_a_processor_are_those_of_the_wall_clock() -> None:
    backend = backend_of("cuda", CPU, FP32)
    first, second = backend.timestamp(), backend.timestamp()
    assert 0 <= backend.seconds_between(first, second) < 60
