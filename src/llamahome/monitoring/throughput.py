"""How long each part of a step takes, and how much arithmetic a token costs.

Parts are exclusive: time inside an inner part is not counted in the outer one, so the parts of a step never add up to more than
its wall time. A moment is whatever `mark` returns: where a device works behind the host, an event in its queue, which is read only when
the sums are taken. Cost: two marks per part (measured on a processor: 1.4 µs). One thread only.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PARTS = ("data", "forward", "backward", "exchange", "update", "save", "evaluate")


_UNREAD = 1024
"""Spans that are kept before the older half is read, which by then has long passed: two events each."""


class Parts:
    """What a PartClock has measured between two cuts; reading it waits for what the device still does for these parts."""

    def __init__(self, seconds: dict[str, float], spans: list[tuple[str, Any, Any]], between: Callable[[Any, Any], float]) -> None:
        self._seconds, self._spans, self._between = seconds, spans, between

    def read(self) -> dict[str, float]:
        """Seconds per part."""
        for name, start, end in self._spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._between(start, end)
        self._spans = []
        return self._seconds


class PartClock:
    """Adds up the time of named parts until someone takes the sums."""

    def __init__(self, mark: Callable[[], Any] = time.perf_counter, between: Callable[[Any, Any], float] = lambda a, b: b - a) -> None:
        """`mark` notes a moment, `between` gives the seconds from one to a later one, waiting for it if it must."""
        self._now, self._between = mark, between
        self._seconds: dict[str, float] = {}
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: list[str] = []
        self._mark = mark()

    def _charge(self) -> None:
        now = self._now()
        if self._open:
            self._spans.append((self._open[-1], self._mark, now))
            if len(self._spans) >= _UNREAD:
                self._read(_UNREAD // 2)
        self._mark = now

    def _read(self, count: int) -> None:
        """Add up the oldest spans."""
        self._seconds = Parts(self._seconds, self._spans[:count], self._between).read()
        del self._spans[:count]

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

    def cut(self) -> Parts:
        """What was measured since the last cut; starts again from zero and waits for nothing. A part still open is counted up to now."""
        self._charge()
        taken = Parts(self._seconds, self._spans, self._between)
        self._seconds, self._spans = {}, []
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


_SIDE, _LARGE_SIDE, _FAST = 1024, 8192, 5e12
"""measured: on processors 2,048 is not faster than 1,024 and takes eight times as long. What does so many operations a second is an
accelerator, which a small product does not fill: there 8,192 takes a few milliseconds."""


def measured_peak_flops(device: "torch.device", dtype: "torch.dtype") -> float:
    """Best rate of one large square matrix product on this device, in operations per second; takes a tenth of a second."""
    rate = _product_rate(device, dtype, _SIDE)
    return _product_rate(device, dtype, _LARGE_SIDE) if rate > _FAST else rate


def _product_rate(device: "torch.device", dtype: "torch.dtype", side: int) -> float:
    import torch

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
