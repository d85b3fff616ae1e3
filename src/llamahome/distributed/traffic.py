"""What a process sends to the others, counted exchange by exchange.

A ring of n processes sends (n - 1) / n of the data in a gather or a scatter and twice that in a sum, which is a scatter and a gather; no
algorithm sends less per process (Patarasuk and Yuan, 2009). tests/distributed/test_traffic.py holds the count against the wire.
"""

from dataclasses import dataclass


@dataclass
class Traffic:
    """Bytes and exchanges of this process since somebody took them. Not safe for several threads, which never exchange at once."""

    sent: float = 0.0
    exchanges: int = 0

    def summed(self, size: int, ranks: int) -> None:
        """A tensor of `size` bytes was summed over `ranks`."""
        self._add(2 * size * (ranks - 1) / ranks)

    def gathered(self, size: int, ranks: int) -> None:
        """`size` bytes, of which each of `ranks` held its part, were put together on all of them; or summed and dealt out in parts."""
        self._add(size * (ranks - 1) / ranks)

    def _add(self, sent: float) -> None:
        if sent:
            self.sent += sent
            self.exchanges += 1

    def take(self) -> dict[str, float]:
        """Both under their names as metrics; starts again from zero. Empty when nothing was sent."""
        sent, exchanges, self.sent, self.exchanges = self.sent, self.exchanges, 0.0, 0
        return {"net/sent": sent, "net/exchanges": exchanges} if exchanges else {}
