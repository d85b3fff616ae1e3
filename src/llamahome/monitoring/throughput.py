"""How long each part of a step takes, and how much arithmetic a token costs.

Parts are exclusive: time inside an inner part is not counted in the outer one, so the parts of a step never add up to more than
its wall time. Cost: two clock readings per part (measured: 1.4 µs). One thread only.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PARTS = ("data", "forward", "backward", "exchange", "update", "save", "evaluate")


class PartClock:
    """Adds up the wall time of named parts until someone takes the sums."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = now()

    def _charge(self) -> None:
        now = self._now()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the block as `name`, also when the block raises."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds per part since the last call; starts again from zero. A part that is still open is counted up to now."""
        self._charge()
        taken, self._seconds = self._seconds, {}
        return taken


def model_flops_per_token(
    *, matmul_weights: int, trained_matmul_weights: int, head_weights: int, head_is_trained: bool, target_share: float
) -> float:
    """Floating-point operations that one token needs in forward and backward, without any that are done twice.

    A weight costs 2 forward and 2 for the gradient of its input; a trained one 2 more for its own gradient. `matmul_weights` are all
    weights in matrix products but the output head, adapters included; the head works on targets alone. Attention scores are left out
    (they are a few percent at lengths below 2,000), so the utilization computed from this is a lower bound.
    """
    body = 4.0 * matmul_weights + 2.0 * trained_matmul_weights
    return body + target_share * head_weights * (6.0 if head_is_trained else 4.0)


def measured_peak_flops(device: "torch.device", dtype: "torch.dtype") -> float:
    """Best rate of one large square matrix product on this device, in operations per second; takes a tenth of a second."""
    import torch

    side = 8192 if device.type == "cuda" else 1024  # measured: on processors 2,048 is not faster and takes eight times as long
    left = torch.ones(side, side, device=device, dtype=dtype)
    right = torch.ones(side, side, device=device, dtype=dtype)
    best = 0.0
    for attempt in range(4):
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        if attempt:  # the first one pays for start-up
            best = max(best, 2.0 * side**3 / (time.perf_counter() - started))
    return best
