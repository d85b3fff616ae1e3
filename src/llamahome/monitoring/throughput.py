"""Measures the time of each part of a step, counts the operations per token, and measures the peak rate of a device.

Times are exclusive: time in an inner part is not counted in the outer part, so the parts of a step never add up to more than its wall
time. `mark` returns a timestamp; on a device that runs asynchronously it is an event in the device's queue, which is read only when the
times are read. Cost: two marks per part (measured on a CPU: 1.4 µs). Not thread-safe.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MAX_UNREAD = 1024
"""Spans (two events each) that are kept unread. Beyond that the older half is read, which the device finished long ago."""


class PartTimes:
    """The times that a PartClock measured between two cuts. `read` waits until the device has finished these parts."""

    def __init__(self, seconds: dict[str, float], spans: list[tuple[str, Any, Any]], between: Callable[[Any, Any], float]) -> None:
        self._seconds, self._spans, self._between = seconds, spans, between

    def read(self) -> dict[str, float]:
        """Return seconds per part."""
        for name, start, end in self._spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._between(start, end)
        self._spans = []
        return self._seconds


class PartClock:
    """Adds up the time of named parts between two cuts."""

    def __init__(
        self,
        mark: Callable[[], Any] = time.perf_counter,
        between: Callable[[Any, Any], float] = lambda a, b: b - a,
        *,
        watch: Callable[[str], None] = lambda part: None,
    ) -> None:
        """`mark` returns a timestamp; `between` returns the seconds between two timestamps and may wait for the second one.

        `watch` gets the name of each part that begins or goes on, and an empty name when none does.
        """
        self._mark, self._between, self._watch = mark, between, watch
        self._seconds: dict[str, float] = {}
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: list[str] = []
        self._last_mark = mark()

    def _charge(self) -> None:
        now = self._mark()
        if self._open:
            self._spans.append((self._open[-1], self._last_mark, now))
            if len(self._spans) >= _MAX_UNREAD:
                self._read(_MAX_UNREAD // 2)
        self._last_mark = now

    def _read(self, count: int) -> None:
        """Read and add up the `count` oldest spans."""
        self._seconds = PartTimes(self._seconds, self._spans[:count], self._between).read()
        del self._spans[:count]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time in the block as `name`, also if the block raises."""
        self._charge()
        self._open.append(name)
        self._watch(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            self._watch(self._open[-1] if self._open else "")

    def cut(self) -> PartTimes:
        """Return the times since the last cut without waiting, and start from zero. An open part is counted up to now."""
        self._charge()
        times = PartTimes(self._seconds, self._spans, self._between)
        self._seconds, self._spans = {}, []
        return times


def model_flops_per_token(
    *, matmul_weights: int, trained_matmul_weights: int, head_weights: int, head_is_trained: bool, target_share: float
) -> float:
    """Floating-point operations per token in forward and backward, without recomputation.

    A weight costs 2 forward and 2 for the gradient of its input; a trained weight costs 2 more for its own gradient. `matmul_weights` are
    all weights in matrix products, adapters included, but for the output head, which is computed for targets only. Attention scores are
    left out (a few percent at lengths below 2,000), so a utilization computed from this is a lower bound.
    """
    body = 4.0 * matmul_weights + 2.0 * trained_matmul_weights
    return body + target_share * head_weights * (6.0 if head_is_trained else 4.0)


_SMALL_SIDE, _LARGE_SIDE, _ACCELERATOR_FLOPS = 1024, 8192, 5e12
"""measured: on CPUs, 2,048 is not faster than 1,024 and takes eight times as long. A device with more than _ACCELERATOR_FLOPS is an
accelerator, which needs a large product to be fully used; 8,192 takes a few milliseconds there."""


def measured_peak_flops(device: "torch.device", dtype: "torch.dtype") -> float:
    """Best rate of a large square matrix product on this device, in operations per second. Takes 0.1 s."""
    rate = _product_rate(device, dtype, _SMALL_SIDE)
    return _product_rate(device, dtype, _LARGE_SIDE) if rate > _ACCELERATOR_FLOPS else rate


def _product_rate(device: "torch.device", dtype: "torch.dtype", side: int) -> float:
    import torch

    left = torch.ones(side, side, device=device, dtype=dtype)
    right = torch.ones(side, side, device=device, dtype=dtype)
    best = 0.0
    for attempt in range(4):
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        if attempt:  # the first product includes start-up
            best = max(best, 2.0 * side**3 / (time.perf_counter() - started))
    return best
