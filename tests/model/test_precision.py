"""Number types are what was asked for; trained weights stay float32 whatever is asked for; auto is decided by a race."""

import pytest
import torch
from tests.support.models import CPU

from llamahome.config.schema import Config
from llamahome.model.precision import bf16_speedup, choose_precision

F, B = torch.float32, torch.bfloat16


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
    ],
)
def test_what_was_asked_for_is_what_is_used(method: str, mixed: bool | str, dtype: str, storage: torch.dtype, compute: torch.dtype) -> None:
    config = Config.model_validate({"training": {"method": method, "mixed_precision": mixed}, "model": {"dtype": dtype}})
    chosen = choose_precision(config, CPU)
    assert (chosen.storage, chosen.compute) == (storage, compute) and chosen.reason
    assert chosen.autocast == (storage != compute) and chosen.name == ("bf16" if compute == B else "no")


def test_auto_is_decided_by_what_this_machine_measures() -> None:
    speedup, chosen = bf16_speedup(CPU), choose_precision(Config(), CPU)
    assert speedup > 0 and chosen.storage == chosen.compute in (F, B) and "as fast as float32 here" in chosen.reason
    if not 0.8 < speedup < 1.8:  # nearer to the border two races may differ
        assert (chosen.compute == B) == (speedup >= 1.2)
