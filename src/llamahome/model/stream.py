"""A frozen base larger than memory: its layers are read from the files ahead of the pass that uses them, and given back after it.

The parts are the layers of the decoder and then the output head. A forward pass uses them upwards, a backward pass downwards. While one
computes, a thread reads those that come next. Some layers, spread evenly, stay in memory as far as there is room: every pass then reads the
same rest, whatever its direction. No number of a pass depends on any of it, because weights are read at the same addresses as ever.
Memory: the room, about three layers, and what is kept. Cost: the rest of the base is read twice in every pass that trains, once in every
other. A weight counts only if it lies unchanged in a mapped file (file_pages.py), so what is given back can be read again.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.model.file_pages import Pages, pages_of, unchanged_mappings
from llamahome.model.packed_weight import PackedWeight, packed_tensors
from llamahome.model.packing import decoder_of
from llamahome.model.shard_load import local_of, mesh_of
from llamahome.units import show_bytes

_ATTRIBUTE = "llamahome_stream"
LAYERS_AT_ONCE = 3
"""The layer that computes and the two that are read next."""


@dataclass(frozen=True)
class Part:
    """What is read together: a layer, or the output head."""

    pages: tuple[Pages, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in files."""
        return sum(each.nbytes for each in self.pages)


def read_part(part: Part) -> None:
    """Read a part, and return when it is in memory."""
    for pages in part.pages:
        pages.read()


def drop_part(part: Part) -> None:
    """Give the memory of a part back."""
    for pages in part.pages:
        pages.drop()


class Stream:
    """Reads the parts of one model as its passes come to them. `waited_s` and `read_bytes` add up over its life."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        keep_bytes: int = 0,
        read: Callable[[Part], None] = read_part,
        drop: Callable[[Part], None] = drop_part,
    ) -> None:
        """`parts` are the layers in their order, and then the output head. Up to `keep_bytes` of them stay in memory."""
        self.waited_s, self.read_s, self.read_bytes = 0.0, 0.0, 0
        self.batch_tokens = 2048
        """Most tokens of prompts and answers that are generated together: what memory is left for."""
        self.part_of: dict[int, int] = {}
        """The part of each weight, by the id of the tensor."""
        self.rows: list[Pages] = []
        """Of an embedding that is no part: given back after each pass."""
        self.storages: list[torch.UntypedStorage] = []
        """Of all weights, so that what a part names stays mapped as long as the stream lives."""
        self._parts, self._read_part, self._drop_part = list(parts), read, drop
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._held: dict[int, Future[None]] = {}
        """The parts in memory or being read, the one used longest ago first."""
        self._at, self._kept, self._reach = -1, frozenset[int](), len(self._parts)
        self._look: Callable[[], int] | None = None
        """How much more could stay in memory; negative if less can."""
        self._say: Callable[[str], None] = lambda line: None
        self.keep(keep_bytes)

    @property
    def base_bytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self._parts)

    @property
    def room_bytes(self) -> int:
        """Memory for the parts that are not kept."""
        sizes = [part.nbytes for part in self._parts]
        pairs = [first + second for first, second in pairwise(sizes)]
        return min(sum(sizes), max(LAYERS_AT_ONCE * max(sizes[:-1]), *pairs))

    @property
    def kept_bytes(self) -> int:
        """Of the parts that stay in memory."""
        return sum(self._parts[number].nbytes for number in self._kept)

    @property
    def seconds_per_byte(self) -> float:
        """Of reading, as measured so far; 0 if nothing was read."""
        return self.read_s / max(1, self.read_bytes)

    def kept_with(self, keep_bytes: int) -> int:
        """Bytes of the parts that stay in memory if there is so much for them."""
        return sum(self._parts[number].nbytes for number in self._chosen(keep_bytes))

    def _chosen(self, keep_bytes: int) -> frozenset[int]:
        """The parts that stay in memory: all, or layers that are spread evenly."""
        layers = len(self._parts) - 1
        if keep_bytes >= self.base_bytes:
            return frozenset(range(layers + 1))
        count = min(layers, max(0, keep_bytes) // max(1, *(part.nbytes for part in self._parts[:-1])))
        return frozenset(number for number in range(layers) if (number + 1) * count // layers > number * count // layers)

    def leave_out_head(self) -> None:
        """From now on the output head and the embedding are no parts."""
        self._give_back_all()
        self._parts[-1], self.rows = Part(()), []

    def keep(self, keep_bytes: int) -> None:
        """From now on, let up to `keep_bytes` of the parts stay in memory; all others leave it."""
        self._kept = self._chosen(keep_bytes)
        self._give_back_all(but=self._kept)

    def watch(self, free: Callable[[], int], *, spare: int, say: Callable[[str], None]) -> None:
        """From now on keep less if at the end of a forward pass fewer than `spare` bytes are free beside the base; never more again.

        `free` reads the bytes that this process can allocate; files count as free, so also what is kept.
        """
        self._say = say
        self._look = lambda: free() - spare - self.kept_bytes - (self.room_bytes if self.kept_bytes < self.base_bytes else 0)

    def leave_layers(self) -> None:
        """The pass has gone through all layers: activations are at their most, and the output head is next."""
        if self._look is not None and (before := self.kept_bytes) and (more := self._look()) < 0:
            self.keep(max(0, before + more))
            self._say(f"less memory is free: {show_bytes(self.kept_bytes)} of the base stay in memory instead of {show_bytes(before)}")
        self.enter(len(self._parts) - 1, step=1)
        for pages in self.rows:  # those of the tokens of this pass
            pages.drop()

    def _give_back_all(self, *, but: Collection[int] = ()) -> None:
        for number in [number for number in self._held if number not in but]:
            self._give_back(number)
        self._at = -1

    def enter(self, number: int, *, step: int) -> None:
        """Part `number` is used now, on the way up (`step` 1) or down (-1): wait until it is there, and read what comes next."""
        if number == self._at:  # a layer whose activations are computed again in its backward pass
            return
        self._at, room = number, self.room_bytes
        wanted = [number, *self._next(number, step, room - self._streamed_bytes(number))]
        for old in [old for old in self._held if old not in self._kept and old not in wanted]:
            if sum(map(self._streamed_bytes, {*self._held, *wanted})) <= room:
                break
            self._give_back(old)
        for each in wanted:
            if each not in self._held:
                self._held[each] = self._thread.submit(self._timed_read, self._parts[each])
        self._held[number] = here = self._held.pop(number)
        began = time.perf_counter()
        here.result()
        self.waited_s += time.perf_counter() - began

    def _next(self, number: int, step: int, room: int) -> list[int]:
        """The parts that come after `number`, as many as there is room for. Kept ones take none, and are read once."""
        following: list[int] = []
        for each in self._route(number, step):
            room -= self._streamed_bytes(each)
            if room < 0:
                break
            following.append(each)
        return following

    def _route(self, number: int, step: int) -> Iterator[int]:
        """The way of the pass from `number`, once through all parts: down again from the head if gradients are computed, else from 0."""
        last, seen = len(self._parts) - 1, {number}
        turns = torch.is_grad_enabled()
        while len(seen) <= last:
            if number == last and step > 0:
                number, step = (last - 1, -1) if turns else (0, 1)
            elif number == 0 and step < 0:
                number, step = 1, 1
            else:
                number += step
            if number not in seen:
                seen.add(number)
                if number < self._reach or number == last:
                    yield number

    @contextmanager
    def first_layers(self, count: int) -> Iterator[None]:
        """Read no further ahead than these layers, and the head, while passes use no others."""
        before, self._reach = self._reach, count
        try:
            yield
        finally:
            self._reach = before

    def _streamed_bytes(self, number: int) -> int:
        return 0 if number in self._kept else self._parts[number].nbytes

    def _timed_read(self, part: Part) -> None:
        began = time.perf_counter()
        self._read_part(part)
        self.read_s += time.perf_counter() - began
        self.read_bytes += part.nbytes

    def _give_back(self, number: int) -> None:
        """In the thread that reads, so that memory is free before the next part is read."""
        del self._held[number]
        self._thread.submit(self._drop_part, self._parts[number])


def stream_layers(model: PreTrainedModel, layers: Sequence[nn.Module], *, keep_bytes: int) -> Stream | None:
    """Read the weights of `model` as its passes use them from now on; None if one of its `layers` does not lie unchanged in a file.

    `keep_bytes` of them stay in memory. Call it after loading, before anything replaces a weight.
    """
    mappings, head, embedding = unchanged_mappings(), model.get_output_embeddings(), model.get_input_embeddings()
    parts = [Part(tuple(pages_of(_tensors_of(module), mappings))) for module in (*layers, head)]
    if not all(part.nbytes for part in parts[:-1]):
        return None
    stream = Stream(parts, keep_bytes=keep_bytes)
    stream.part_of = {id(weight): number for number, module in enumerate((*layers, head)) for weight in module.parameters()}
    for number, layer in enumerate(layers):
        _hook(stream, layer, number)
    if id(embedding.weight) not in stream.part_of:
        stream.rows = pages_of([embedding.weight], mappings)
    stream.storages = [weight.untyped_storage() for weight in _tensors_of(model)]

    decoder_of(model).register_forward_hook(lambda *_: stream.leave_layers())
    setattr(model, _ATTRIBUTE, stream)
    return stream


def stream_of(model: nn.Module) -> Stream | None:
    """What reads the base of `model` as it is used; None if the base is held in memory."""
    stream: Stream | None = getattr(model, _ATTRIBUTE, None)
    return stream


def hold_tables(model: PreTrainedModel) -> None:
    """Keep embedding and output head of a streamed `model` in memory, because rows of them are to be changed."""
    if (stream := stream_of(model)) is None:
        return
    stream.leave_out_head()
    for weight in {id(each.weight): each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        weight.data = weight.data.clone()


def held_bytes(model: nn.Module, *, processes: int = 1) -> int:
    """Bytes of memory-mapped weights that a pass needs at a time: all, or those of the layers that are read at once.

    Of all `processes` of this machine together: they map the same bytes, or each its own rows. The bytes count as free memory, because the
    system can take them back, but a pass that takes their memory reads them from the disk again.
    """
    if (stream := stream_of(model)) is not None:
        return stream.room_bytes
    mapped = sum(pages.nbytes for pages in pages_of(_tensors_of(model), unchanged_mappings()))
    return mapped if mesh_of(model) is None else mapped * processes


def in_turn(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The `weights` of `model`; each is read when its turn comes, if the base is streamed."""
    stream = stream_of(model)
    for weight in weights.values():
        number = None if stream is None else stream.part_of.get(id(weight))
        if stream is not None and number is not None:
            stream.enter(number, step=1)
        yield weight


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The frozen weights of a module as they lie in memory."""
    for weight in module.parameters():
        if isinstance(weight, PackedWeight):
            yield from packed_tensors(weight.packed).values()
        else:
            yield local_of(weight)


def _hook(stream: Stream, layer: nn.Module, number: int) -> None:
    def before(*_: Any) -> None:
        stream.enter(number, step=1)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: stream.enter(number, step=-1))

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
