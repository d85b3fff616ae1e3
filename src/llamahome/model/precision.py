"""Which number types a run uses: probed on this machine, never assumed from its name.

bfloat16 products are several times faster than float32 on processors that have them and tens of times slower on those that emulate them,
so a race of about 20 ms decides. Trained weights, their gradients and the optimizer are float32 whatever is chosen here.
"""

import time
from dataclasses import dataclass

import torch

from llamahome.config.schema import Config

_FAST_ENOUGH = 1.2
"""bfloat16 must win by this much to be worth its rounding."""
_ROWS, _INNER, _RACES = 512, 576, 10


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


def bf16_speedup(device: torch.device) -> float:
    """How many times faster this device multiplies bfloat16 than float32 matrices: best against best of ten short races in turn."""
    if device.type == "cuda":
        return 2.0 if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(_RACES):
        for dtype in best:
            a, b = torch.ones(_ROWS, _INNER, dtype=dtype, device=device), torch.ones(_INNER, _INNER, dtype=dtype, device=device)
            start = time.perf_counter()
            (a @ b)[0, 0].item()  # the read waits for an asynchronous device
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def choose_precision(config: Config, device: torch.device) -> Precision:
    """Resolve model.dtype and training.mixed_precision for this device."""
    wanted, full = config.training.mixed_precision, config.training.method == "full"
    if wanted in ("auto",):
        speedup = bf16_speedup(device)
        low, reason = speedup >= _FAST_ENOUGH, f"bf16 products are {speedup:.1f}x as fast as float32 here"
    else:
        low, reason = wanted in (True, "bf16"), "as set"
    compute = torch.bfloat16 if low else torch.float32
    if full:
        storage = torch.float32
    elif config.model.dtype == "auto":
        storage = compute
    else:
        storage = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
        if storage == torch.bfloat16 and not low:
            compute, reason = torch.bfloat16, "model.dtype is bfloat16"
    return Precision(storage, compute, reason)
