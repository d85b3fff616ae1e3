"""What the processes of a run tell each other with every step: how long their own work takes, and the energy that they have measured.

The numbers travel in the exchange that counts the tokens of a step, so they cost no exchange of their own. Own work is reading rows,
forward and backward, without waiting for others: the rows are laid out so that it takes about as long on every process.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from llamahome.monitoring.energy import JOULES_PER_KWH

_OWN_WORK = ("data", "forward", "backward")


class Ranks:
    """Times and energy of all processes; `joules` is what this one has measured so far, None if it cannot."""

    def __init__(
        self, rank: int = 0, size: int = 1, *, joules: Callable[[], float | None] = lambda: None, kwh_before: float | None = None
    ) -> None:
        """`kwh_before` is what earlier processes of a resumed run have measured."""
        self._rank, self._size, self._read, self._before = rank, size, joules, kwh_before
        self._own_us = 0
        self._told: list[int] = []

    def own(self, seconds: Mapping[str, float], steps: int) -> None:
        """Note the seconds per part of the last steps of this process."""
        self._own_us = round(1e6 * sum(seconds.get(part, 0.0) for part in _OWN_WORK) / steps)

    def send(self) -> list[int]:
        """What this process adds to the exchange: joules, whether it measures any, and its time per step at its own place."""
        joules = self._read()
        times = [self._own_us if rank == self._rank else 0 for rank in range(self._size)] if self._size > 1 else []
        return [round(joules or 0), joules is not None, *times]

    def receive(self, told: Sequence[int]) -> None:
        """Keep the sums over all processes."""
        self._told = list(told)

    def metrics(self) -> dict[str, float]:
        """The metrics of the last exchange: who was slowest, by how much, and the energy of the run. Unknown ones are left out."""
        metrics: dict[str, float] = {}
        times = self._told[2:]
        if times and all(times):
            slowest = max(range(self._size), key=times.__getitem__)
            metrics = {"ranks/slowest": slowest, "ranks/slowest_s": times[slowest] / 1e6, "ranks/median_s": median(times) / 1e6}
        kwh = self.kwh()
        return metrics if kwh is None else {**metrics, "energy/kwh": kwh}

    def kwh(self) -> float | None:
        """Energy of the run over all its processes and resumes; None if nothing has measured any."""
        if len(self._told) < 2 or not self._told[1]:
            return self._before
        return (self._before or 0.0) + self._told[0] / JOULES_PER_KWH
