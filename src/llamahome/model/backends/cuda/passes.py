"""How a pass travels to the device: padded to one of a few sizes, in one host buffer, by one copy beside the pass before it.

A compiled layer is made for one number of tokens, so passes come in few sizes. What fills a pass up is documents of their own: tokens
behind the last boundary would get gradients that are not numbers (measured, docs/log.md), and no target lies in them.

Legend: T tokens of a pass with its padding, N targets.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llamahome.model.backends.backend import B, Batch
from llamahome.model.backends.documents import Documents

SMALLEST = 256
"""Tokens of the smallest pass; also the longest document of padding where all others are shorter."""
_FINE = 2048
"""From here on there are four sizes between a power of two and the next: at most a fifth of a pass is padding, a tenth on average."""


def padded_size(tokens: int) -> int:
    """Tokens of the smallest size of pass that holds so many."""
    power = max(SMALLEST, 1 << (tokens - 1).bit_length())
    if power < _FINE:
        return power
    grain = power // 8
    return -(-tokens // grain) * grain


@dataclass(frozen=True, eq=False)
class Packed(Documents):
    """The documents of a pass on the device, those of its padding behind the others."""

    longest: int = 0
    """Tokens of the longest document."""
    buffer: Tensor | None = None
    """All that was copied; the tensors of the pass are views of it."""
    ready: torch.cuda.Event | None = None
    """When the copy is done; None where nothing has to be waited for."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """What a token does not see, [T, T], by the size of the window; made where a layer needs it."""

    @property
    def boundaries(self) -> Tensor:
        """int32 [documents + 1], on the device."""
        if self.starts is None:
            raise ValueError("a packed pass has its boundaries on the device")
        return self.starts


def padding_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of the documents that fill a pass up; none is longer than the longest, so attention stays as cheap as it was."""
    total, longest = sum(lengths), max(*lengths, SMALLEST)
    rest = padded_size(total) - total
    whole, last = divmod(rest, longest)
    return (longest,) * whole + ((last,) if last else ())


class Courier:
    """Takes passes to `device`; may be called by several threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def deliver(self, batch: B) -> B:
        """`batch` on the device, padded; nobody waits for the copy before `receive`."""
        lengths = batch.lengths + padding_of(batch.lengths)
        sizes = _Sizes(sum(lengths), int(batch.labels_N.numel()), len(lengths))
        host = torch.zeros(sizes.words, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        _fill(host, sizes, batch, lengths)
        buffer, ready = self._send(host)
        tokens_T, positions_T, rows_N, labels_N, starts = sizes.parts(buffer)
        there: dict[str, object] = {"tokens_T": tokens_T, "positions_T": positions_T, "rows_N": rows_N, "labels_N": labels_N}
        documents = Packed(lengths, starts=starts, longest=max(lengths), buffer=buffer, ready=ready)
        delivered: B = replace(batch, documents=documents, **there)  # type: ignore[type-var]
        return delivered

    def _send(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.device.type != "cuda":
            return host.to(self.device), None
        with torch.cuda.device(self.device):  # a thread of the loader begins at the first device
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                buffer = host.to(self.device, non_blocking=True)
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
        return buffer, ready

    def receive(self, documents: Packed) -> None:
        """Let what is queued from now on wait for the copy, on the device; the host does not wait."""
        if documents.ready is not None and documents.buffer is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(documents.ready)
            documents.buffer.record_stream(stream)  # its memory belongs to the stream of the copy


@dataclass(frozen=True)
class _Sizes:
    """Where the parts of a pass lie in its buffer."""

    tokens: int
    targets: int
    documents: int

    @property
    def words(self) -> int:
        """int64 of the whole; boundaries are int32."""
        return 2 * self.tokens + 2 * self.targets + self.documents // 2 + 1

    def parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Views: tokens, positions, rows, labels, boundaries."""
        sizes = [self.tokens, self.tokens, self.targets, self.targets, self.documents // 2 + 1]
        tokens, positions, rows, labels, rest = torch.split(buffer, sizes)
        return tokens, positions, rows, labels, rest.view(torch.int32)[: self.documents + 1]


def _fill(host: Tensor, sizes: _Sizes, batch: Batch, lengths: tuple[int, ...]) -> None:
    """Write a pass into its buffer, which is zeros."""
    tokens, positions, rows, labels, starts = sizes.parts(host)
    real = len(batch.tokens_T)
    tokens[:real], positions[:real] = batch.tokens_T, batch.positions_T
    rows.copy_(batch.rows_N)
    labels.copy_(batch.labels_N)
    torch.cumsum(torch.tensor(lengths), 0, dtype=torch.int32, out=starts[1:])
    place = real
    for length in lengths[len(batch.lengths) :]:
        torch.arange(length, out=positions[place : place + length])
        place += length


def packed(documents: Documents, device: torch.device) -> Packed:
    """`documents` with their boundaries on the device, for a pass that was not delivered; waits for a copy."""
    if isinstance(documents, Packed):
        return documents
    starts = torch.tensor([0, *documents.lengths]).cumsum(0, dtype=torch.int32).to(device)
    return Packed(documents.lengths, starts=starts, longest=max(documents.lengths))
