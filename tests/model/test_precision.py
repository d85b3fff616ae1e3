"""Requested dtypes are used, trained weights are always float32, and auto follows a measurement."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.models import CPU

from llamahome.config.schema import Config
from llamahome.errors import MachineError
from llamahome.model.backends import choose
from llamahome.model.backends.choose import bf16_speedup, low_precision
from llamahome.model.backends.cpu.native import cache_folder
from llamahome.model.precision import LowPrecision, Precision, choose_precision

F, B, H = torch.float32, torch.bfloat16, torch.float16


FAST, SLOW, EMULATED = (LowPrecision.measured(speedup) for speedup in (3.0, 0.9, 0.02))


def chosen(low: LowPrecision, method: str = "lora", mixed: bool | str = "auto", dtype: str = "auto") -> Precision:
    config = Config.model_validate({"training": {"method": method, "mixed_precision": mixed}, "model": {"dtype": dtype}})
    return choose_precision(config, low)


@pytest.mark.parametrize(
    ("method", "mixed", "dtype", "storage", "compute"),
    [
        ("lora", True, "auto", B, B),
        ("lora", "bf16", "auto", B, B),
        ("lora", False, "auto", F, F),
        ("lora", "no", "auto", F, F),
        ("lora", True, "float32", F, B),
        ("lora", False, "float32", F, F),
        ("lora", False, "bfloat16", B, B),
        ("full", True, "auto", F, B),
        ("full", False, "auto", F, F),
        ("full", True, "bfloat16", F, B),
        ("lora", "fp16", "auto", H, H),
        ("lora", "fp16", "float16", H, H),
        ("lora", "fp16", "float32", F, H),
        ("full", "fp16", "auto", F, H),
    ],
)
def test_the_requested_dtypes_are_used(method: str, mixed: bool | str, dtype: str, storage: torch.dtype, compute: torch.dtype) -> None:
    precision = chosen(replace(FAST, why_no_half=None), method, mixed, dtype)
    assert (precision.storage, precision.compute) == (storage, compute) and precision.reason
    assert precision.autocast == (storage != compute) and precision.name == {B: "bf16", H: "fp16", F: "no"}[compute]


@pytest.mark.parametrize("low", [SLOW, EMULATED])
@pytest.mark.parametrize("mixed", [True, "auto"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_true_and_auto_are_float32_if_bfloat16_is_not_fast(method: str, mixed: bool | str, low: LowPrecision) -> None:
    precision = chosen(low, method, mixed)
    assert (precision.storage, precision.compute) == (F, F) and "bf16" in precision.reason


@pytest.mark.parametrize(("mixed", "dtype"), [("bf16", "auto"), ("auto", "bfloat16"), (True, "bfloat16"), ("fp16", "auto")])
def test_a_requested_dtype_that_the_device_emulates_is_refused(mixed: bool | str, dtype: str) -> None:
    with pytest.raises(MachineError) as caught:
        chosen(EMULATED, mixed=mixed, dtype=dtype)
    (problem,) = caught.value.problems
    assert problem.code == "training.no-such-precision" and "auto" in problem.hint
    if mixed != "fp16":
        assert chosen(SLOW, mixed=mixed, dtype=dtype).compute == B, "slow is the user's choice"


def test_a_processor_multiplies_float16_in_plain_torch_alone() -> None:
    values = {"training": {"mixed_precision": "fp16"}, "model": {"backend": "cpu"}}
    with pytest.raises(MachineError, match="back end of processors") as caught:
        choose.choose_backend(Config.model_validate(values), CPU)
    assert caught.value.problems[0].code == "training.no-such-precision"
    plain = choose.choose_backend(Config.model_validate(values | {"model": {"backend": "reference"}}), CPU)
    assert plain.name == "reference" and plain.precision.name == plain.precision.products == "fp16"


def test_auto_follows_the_measurement_of_this_machine() -> None:
    low = low_precision(CPU)
    precision = choose_precision(Config(), low)
    assert bf16_speedup(CPU) > 0 and "here" in precision.reason
    assert precision.storage == precision.compute == (B if low.fast else F)


def test_a_clear_measurement_is_stored_and_a_damaged_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    answers = iter((5.0, 1.0, 0.1, 3.0))
    monkeypatch.setattr(choose, "bf16_speedup", lambda device: next(answers))
    kept = cache_folder() / "number-types.json"
    assert low_precision(CPU) == low_precision(CPU) == LowPrecision.measured(5.0)
    kept.write_text("{")
    assert low_precision(CPU) == LowPrecision.measured(1.0) and kept.read_text() == "{", "what decides nothing is not kept"
    assert low_precision(CPU) == low_precision(CPU) == LowPrecision.measured(0.1)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert low_precision(CPU) == LowPrecision.measured(3.0), "a processor that is held to less is another one"
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert low_precision(CPU) == LowPrecision.measured(0.1), "what was known stays"
