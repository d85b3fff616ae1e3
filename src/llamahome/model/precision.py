"""Choose the dtypes of a run from the settings and from measurements of the device, never from the device's name.

bfloat16 products are several times faster than float32 on processors that support them, and tens of times slower if they are emulated.
Trained weights, their gradients and the optimizer state are always float32.
"""

from dataclasses import dataclass

import torch

from llamahome.config.schema import Config
from llamahome.errors import MachineError, Problem

_FAST_ENOUGH = 1.2
"""Speedup from which bfloat16 is worth its rounding."""
_EMULATED = 0.75
"""Speedup below which bfloat16 is emulated; measured: 1/44 to 1/499 on processors without the instructions, 1.8 and more with them."""


@dataclass(frozen=True)
class LowPrecision:
    """How a device computes bfloat16 products."""

    fast: bool
    """Fast enough to be the default."""
    there: bool
    """Supported by the hardware, not emulated."""
    reason: str
    why_no_half: str | None = None
    """Why it computes no float16 products; None if it does."""

    @staticmethod
    def measured(speedup: float) -> "LowPrecision":
        """From the measured speedup over float32."""
        reason = f"bf16 products are {speedup:.1f}x as fast as float32 here" if speedup >= 0.1 else "bf16 products are emulated here"
        return LowPrecision(speedup >= _FAST_ENOUGH, speedup >= _EMULATED, reason, "the back end of processors computes bf16 or float32")


@dataclass(frozen=True)
class Precision:
    """The dtypes of one run."""

    storage: torch.dtype
    """Dtype of the loaded weights; float32 with method full."""
    compute: torch.dtype
    """Dtype of matrix products."""
    reason: str

    @property
    def autocast(self) -> bool:
        """Whether products need autocast, because weights are stored in another dtype."""
        return self.storage != self.compute

    @property
    def name(self) -> str:
        """The resolved value of training.mixed_precision."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.compute, "no")

    @property
    def products(self) -> str:
        """The type of matrix products, for people."""
        return "float32" if self.compute == torch.float32 else self.name


def choose_precision(config: Config, low: LowPrecision) -> Precision:
    """Resolve model.dtype and training.mixed_precision. Raises MachineError if the device does not support a requested dtype."""
    requested, dtype = config.training.mixed_precision, config.model.dtype
    full, stores_low = config.training.method == "full", dtype == "bfloat16" and config.training.method == "lora"
    if requested == "fp16":
        if low.why_no_half is not None:
            raise MachineError(_refusal("training.mixed_precision", f"fp16 is requested, but {low.why_no_half}"))
        return Precision(torch.float32 if full or dtype == "float32" else torch.float16, torch.float16, "as set")
    if (requested == "bf16" or stores_low) and not low.there:
        where, name = ("training.mixed_precision", "bf16") if requested == "bf16" else ("model.dtype", "bfloat16")
        raise MachineError(_refusal(where, f"{name} is requested, but {low.reason}"))
    if requested in ("no", False):
        computes_low, reason = False, "as set"
    elif requested == "bf16":
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
