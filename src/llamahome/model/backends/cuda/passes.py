"""Copies passes to the device: padded to one of a few sizes, in one host buffer, by one copy that overlaps with the previous pass.

Compiled layers are specific to a number of tokens, so passes come in few sizes. The padding consists of documents of its own without
targets, because tokens behind the last boundary would get NaN gradients (measured, docs/log.md).

Legend: T tokens of a pass including padding, N targets.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llamahome.model.backends.backend import B, Batch, Documents

MIN_TOKENS = 256
"""Tokens of the smallest pass; also the length of padding documents if all other documents are shorter."""
_FINE_SIZES_FROM = 2048
"""From here on there are four sizes between two powers of two: at most a fifth of a pass is padding, and a tenth on average."""


def padded_size(tokens: int) -> int:
    """The smallest size of a pass that holds `tokens`."""
    power = max(MIN_TOKENS, 1 << (tokens - 1).bit_length())
    if power < _FINE_SIZES_FROM:
        return power
    grain = power // 8
    return -(-tokens // grain) * grain


@dataclass(frozen=True, eq=False)
class PackedDocuments(Documents):
    """The documents of a pass on the device, followed by those of its padding."""

    longest: int = 0
    """Tokens of the longest document."""
    buffer: Tensor | None = None
    """The copied memory; the tensors of the pass are views of it."""
    ready: torch.cuda.Event | None = None
    """The end of the copy; None if the copy is synchronous."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Attention masks [T, T] by window, True for keys that a query may not see; filled by layers that need them."""

    @property
    def boundaries(self) -> Tensor:
        """int32 [documents + 1], on the device."""
        if self.starts is None:
            raise ValueError("a packed pass has its boundaries on the device")
        return self.starts


def padding_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of the padding documents; at most the longest length, or MIN_TOKENS, so that attention costs no more per token."""
    total, longest = sum(lengths), max(*lengths, MIN_TOKENS)
    full, last = divmod(padded_size(total) - total, longest)
    return (longest,) * full + ((last,) if last else ())


class PassCopier:
    """Copies passes to `device`; several threads may call it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def to_device(self, batch: B) -> B:
        """`batch` on the device, padded. The copy is asynchronous: call `wait_for_copy` before using it."""
        lengths = batch.lengths + padding_of(batch.lengths)
        layout = _BufferLayout(sum(lengths), int(batch.labels_N.numel()), len(lengths))
        host = torch.zeros(layout.size, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        _fill(host, layout, batch, lengths)
        buffer, ready = self._copy(host)
        extra = {name: self._copy_alone(tensor) for name, tensor in batch.extra.items()}
        tokens_T, positions_T, rows_N, labels_N, starts = layout.views(buffer)
        tensors: dict[str, object] = {"tokens_T": tokens_T, "positions_T": positions_T, "rows_N": rows_N, "labels_N": labels_N}
        documents = PackedDocuments(lengths, starts=starts, longest=max(lengths), buffer=buffer, ready=ready)
        copied: B = replace(batch, documents=documents, extra=extra, **tensors)  # type: ignore[type-var]
        return copied

    def _copy_alone(self, host: Tensor) -> Tensor:
        """`host` on the device, copied in the order of the device's own work, so that nobody has to wait for it."""
        if self.device.type != "cuda":
            return host.to(self.device)
        with torch.cuda.device(self.device):
            return host.pin_memory().to(self.device, non_blocking=True)

    def _copy(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.device.type != "cuda":
            return host.to(self.device), None
        with torch.cuda.device(self.device):  # the current device of a new thread is the first one
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                buffer = host.to(self.device, non_blocking=True)
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
        return buffer, ready

    def wait_for_copy(self, documents: PackedDocuments) -> None:
        """Let the current stream wait for the copy; the host does not wait."""
        if documents.ready is not None and documents.buffer is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(documents.ready)
            documents.buffer.record_stream(stream)  # the allocator assigned its memory to the copy's stream


@dataclass(frozen=True)
class _BufferLayout:
    """Where the parts of a pass are in its buffer."""

    tokens: int
    targets: int
    documents: int

    @property
    def size(self) -> int:
        """Length of the buffer in int64; boundaries are int32."""
        return 2 * self.tokens + 2 * self.targets + self.documents // 2 + 1

    def views(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Views of tokens, positions, rows, labels and boundaries."""
        sizes = [self.tokens, self.tokens, self.targets, self.targets, self.documents // 2 + 1]
        tokens, positions, rows, labels, rest = torch.split(buffer, sizes)
        return tokens, positions, rows, labels, rest.view(torch.int32)[: self.documents + 1]


def _fill(host: Tensor, layout: _BufferLayout, batch: Batch, lengths: tuple[int, ...]) -> None:
    """Write a pass into its buffer, which is zeros."""
    tokens, positions, rows, labels, starts = layout.views(host)
    count = len(batch.tokens_T)
    tokens[:count], positions[:count] = batch.tokens_T, batch.positions_T
    rows.copy_(batch.rows_N)
    labels.copy_(batch.labels_N)
    torch.cumsum(torch.tensor(lengths), 0, dtype=torch.int32, out=starts[1:])
    start = count
    for length in lengths[len(batch.lengths) :]:
        torch.arange(length, out=positions[start : start + length])
        start += length


def packed(documents: Documents, device: torch.device) -> PackedDocuments:
    """`documents` with boundaries on the device; for a pass that `PassCopier` did not copy. Waits for the device."""
    if isinstance(documents, PackedDocuments):
        return documents
    starts = torch.tensor([0, *documents.lengths]).cumsum(0, dtype=torch.int32).to(device)
    return PackedDocuments(documents.lengths, starts=starts, longest=max(documents.lengths))
