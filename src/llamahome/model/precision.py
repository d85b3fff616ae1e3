"""Which number types a run uses: from what was asked for and what the device was measured to do, never from its name.

bfloat16 products are several times faster than float32 on processors that have them and tens of times slower on those that emulate them.
Trained weights, their gradients and the optimizer are float32 whatever is chosen here.
"""

from dataclasses import dataclass

import torch

from llamahome.config.schema import Config
from llamahome.errors import MachineError, Problem

_FAST_ENOUGH = 1.2
"""bfloat16 must win by this much to be worth its rounding."""
_EMULATED = 0.75
"""Below it the device emulates bfloat16: measured 1/44 to 1/499 on processors without the instructions, 1.8 and more on those with them."""


@dataclass(frozen=True)
class LowPrecision:
    """What a device does with bfloat16 products."""

    fast: bool
    """Worth choosing when nobody says."""
    there: bool
    """Not emulated."""
    reason: str

    @staticmethod
    def measured(speedup: float) -> "LowPrecision":
        """From how many times as fast as float32 they are."""
        told = f"bf16 products are {speedup:.1f}x as fast as float32 here" if speedup >= 0.1 else "bf16 products are emulated here"
        return LowPrecision(speedup >= _FAST_ENOUGH, speedup >= _EMULATED, told)


@dataclass(frozen=True)
class Precision:
    """Types of one run."""

    storage: torch.dtype
    """Of weights as they are loaded; with method full always float32."""
    compute: torch.dtype
    """Of matrix products."""
    reason: str

    @property
    def autocast(self) -> bool:
        """Products are cast on the fly, because weights are stored in another type."""
        return self.storage != self.compute

    @property
    def name(self) -> str:
        """What training.mixed_precision is resolved to."""
        return "bf16" if self.compute == torch.bfloat16 else "no"


def choose_precision(config: Config, low: LowPrecision) -> Precision:
    """Resolve model.dtype and training.mixed_precision. Raises MachineError for what the device does not have but emulates."""
    wanted, dtype = config.training.mixed_precision, config.model.dtype
    full, stores_low = config.training.method == "full", dtype == "bfloat16" and config.training.method == "lora"
    if wanted == "fp16":
        raise MachineError(_refusal("training.mixed_precision", "fp16 needs loss scaling; llamahome trains in bf16 or float32"))
    if (wanted == "bf16" or stores_low) and not low.there:
        where, asked = ("training.mixed_precision", "bf16") if wanted == "bf16" else ("model.dtype", "bfloat16")
        raise MachineError(_refusal(where, f"{asked} is asked for by name, but {low.reason}"))
    if wanted in ("no", False):
        computes_low, reason = False, "as set"
    elif wanted == "bf16":
        computes_low, reason = True, "as set"
    else:
        computes_low, reason = low.fast, low.reason
    if stores_low and not computes_low:
        computes_low, reason = True, "model.dtype is bfloat16"
    compute = torch.bfloat16 if computes_low else torch.float32
    if full or dtype == "float32":
        return Precision(torch.float32, compute, reason)
    return Precision(compute, compute, reason)


def _refusal(where: str, message: str) -> Problem:
    hint = "--set training.mixed_precision=auto --set model.dtype=auto"
    return Problem(code="training.no-such-precision", message=message, where=where, hint=hint)
