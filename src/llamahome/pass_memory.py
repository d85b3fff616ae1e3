"""What the free memory decides: the size of passes, whether activations are recomputed, and whether the longest row fits at all.

A row is one pass of its own at least, or with preferences its two answers are. A row whose pass needs more memory than is free is refused
before training, because on a processor the system would end the process instead of refusing memory.
"""

from collections.abc import Callable
from typing import Any

from llamahome.config.objectives import LEARNS
from llamahome.config.optimizers import STATE_BYTES
from llamahome.config.schema import Config
from llamahome.distributed.world import World
from llamahome.errors import OutOfMemory, Problem
from llamahome.model.backends.backend import Backend, OffloadStore
from llamahome.model.lora_vera import FactorBytes, factor_bytes
from llamahome.model.offload import input_bytes, spared_bytes
from llamahome.model.place import ChosenStrategy, largest_pass, longest_pass, needs_checkpointing, shards_of
from llamahome.model.stream import held_bytes
from llamahome.model.targets import copied_bytes
from llamahome.monitoring.resources import free_memory_bytes
from llamahome.training.loaded_model import BaseModel, free_bytes
from llamahome.training.memory import Remedies
from llamahome.units import show_bytes

Say = Callable[[str], None]
Resolved = dict[str, tuple[Any, str]]
"""Key of a setting -> its value, and why."""

MOST_TOKENS = 2**24
"""No longer row is looked for."""
_SAFE = 0.92
"""Share of the free memory that the longest row named in a refusal takes; the estimate is within a tenth (docs/Performance.md)."""


def documents_of_row(config: Config) -> int:
    """Documents that a row brings into one pass."""
    return 2 if LEARNS[config.training.objective] == "pairs" else 1


def remedies_of(config: Config) -> Remedies:
    """What lets a pass of this run take less memory."""

    def shorten(longest: int) -> str:
        if config.training.objective == "grpo":  # most of the row is an answer that the model draws
            return f"grpo.max_new_tokens={max(1, config.grpo.max_new_tokens // 2)}"
        return f"data.max_length={max(16, longest // (2 * documents_of_row(config)))}"

    return Remedies(config.training.gradient_checkpointing is not True, shorten)


def resolve_memory(config: Config, base: BaseModel, world: World, *, longest: int, compiled: bool, say: Say) -> Resolved:
    """training.micro_batch_tokens, gradient_checkpointing and activation_offloading without auto; `longest` is the longest row, in tokens.

    Raises OutOfMemory if that row needs more memory than is free, on all ranks.
    """
    training, backend, model = config.training, base.backend, base.model
    needs = PassMemory(config, base, compiled=compiled)
    free = free_bytes(backend, world) - held_bytes(model, processes=world.local_size) // world.local_size
    most, resolved = documents_of_row(config) * config.data.max_length, Resolved()
    if training.method == "full":
        free -= _update_bytes(training.optimizer, sum(parameter.numel() for parameter in model.parameters()), base.strategy, world)
    tokens = training.micro_batch_tokens
    if tokens == "auto":
        tokens = int(-world.max(-auto_pass_tokens(config, backend, keeps=needs.kept, free=free)))
        resolved["training.micro_batch_tokens"] = tokens, f"{backend.name} back end"
    on, row = training.gradient_checkpointing, min(longest, config.data.max_length)
    if on == "auto" and training.activation_offloading is True:
        on = True
        resolved["training.gradient_checkpointing"] = True, "training.activation_offloading moves the inputs of recomputed layers"
    if on == "auto":
        fullest = max(tokens, most)
        kept = needs.kept(fullest)
        on = bool(world.max(needs_checkpointing(kept, free_bytes=free)))
        why = f"activations of {fullest:,} tokens take about {show_bytes(kept)}, and {show_bytes(max(0, free))} are free"
        resolved["training.gradient_checkpointing"] = on, why
        say(f"gradient checkpointing {'on' if on else 'off'}: {why}")
    moves = _resolve_offloading(needs, row, world, free=free, recomputes=on, say=say)
    if moves[0] is not training.activation_offloading:
        resolved["training.activation_offloading"] = moves
    refuse_too_long(needs, row, world, free=free, recomputes=on, offloads=moves[0])
    return resolved


def _resolve_offloading(needs: "PassMemory", row: int, world: World, *, free: int, recomputes: bool, say: Say) -> tuple[bool, str]:
    """training.activation_offloading for rows of up to `row` tokens, the same on all ranks, and why.

    Raises OutOfMemory if it is true and what is to be moved has no room.
    """
    needed, wanted = needs.of_row(row, recomputes=recomputes), needs.wants_offloading
    if wanted is False or (wanted == "auto" and not (recomputes and world.max(needed > _SAFE * free))):
        return False, "the longest row fits without"
    where, moved = needs.offload_place(), needs.moved(row)
    room = 0 if isinstance(where, str) else offload_room(where, processes=world.local_size)
    if world.max(isinstance(where, str)):
        why = where if isinstance(where, str) else "another process has no place for them"
        if wanted is True:
            say(f"activation offloading off: {why}")
        return False, why
    assert not isinstance(where, str)
    why = f"inputs of layers, {show_bytes(moved)} in the longest row, wait in {where.place}, where {show_bytes(room)} are free"
    if world.max(moved > room):
        if wanted is True:
            hint = "--set training.activation_offloading=false, or free space there"
            raise OutOfMemory(Problem(code="training.no-room-to-offload", message=why, where="training.activation_offloading", hint=hint))
        return False, why
    say(f"activation offloading on: {why}")
    return True, why


def auto_pass_tokens(config: Config, backend: Backend, *, keeps: Callable[[int], int], free: int) -> int:
    """training.micro_batch_tokens where it is auto: the back end's number, or fewer whose activations, `keeps` bytes, fit into `free`."""
    if config.training.gradient_checkpointing is True:
        return backend.micro_batch_tokens
    fewest = max(backend.min_micro_batch_tokens, documents_of_row(config) * config.data.max_length)
    return largest_pass(backend.micro_batch_tokens, fewest=fewest, keeps=keeps, free_bytes=free)


def offload_room(store: OffloadStore, *, processes: int) -> int:
    """Bytes that this process may store, one of so many on this machine."""
    own = store.free_bytes()
    return (free_memory_bytes() if own is None else own) // processes


def _update_bytes(optimizer: str, weights: int, chosen: ChosenStrategy, world: World) -> int:
    """Bytes that gradients and the state of the optimizer take on this process in full fine-tuning; they are not there yet."""
    shards = shards_of(chosen.strategy, world)
    gradients = 4 * weights // (shards if chosen.sums_each_pass else 1)
    return gradients + round(STATE_BYTES[optimizer] * weights / shards)


class PassMemory:
    """Estimates the memory of a pass by its number of tokens."""

    def __init__(self, config: Config, base: BaseModel, *, compiled: bool) -> None:
        self._config, self._base, self._compiled = config, base, compiled
        self._copied, self._factors = 0, FactorBytes()
        if config.training.method == "lora":
            self._copied = copied_bytes(base.model, config.lora.target_modules)
            self._factors = factor_bytes(base.model, config.lora, base.backend.precision.compute)
        self.together = documents_of_row(config)
        self.wants_offloading = config.training.activation_offloading

    def kept(self, tokens: int, *, longest: int | None = None) -> int:
        """Bytes that a pass of `tokens` keeps for its backward pass; `longest` document, data.max_length by default."""
        longest = longest or self.together * self._config.data.max_length
        backend, model = self._base.backend, self._base.model
        kept: int = backend.kept_bytes(self._config, model, tokens, longest=longest, compiled=self._compiled)
        return self._copied + kept + self._factors.of(tokens, recomputes=False)

    def offload_place(self) -> OffloadStore | str:
        """Where inputs of layers can wait outside of the device's memory, or why there is no such place."""
        if self._base.strategy.strategy != "replicate":
            return "sharded weights are gathered in passes that hold the inputs of layers themselves"
        store: OffloadStore | str = self._base.backend.offload_store()
        return store

    def moved(self, row: int) -> int:
        """Bytes of the inputs of all layers in a pass of a row whose documents have `row` tokens."""
        return input_bytes(self._base.model, self.together * row, self._base.backend.precision)

    def of_pass(self, tokens: int, *, recomputes: bool, offloads: bool = False, longest: int | None = None) -> int:
        """Bytes of the activations of a pass of `tokens`, also if layers are computed again, and if their inputs are moved away."""
        if not recomputes:
            return self.kept(tokens, longest=longest)
        longest = longest or self.together * self._config.data.max_length
        backend, model = self._base.backend, self._base.model
        layers: int = backend.recomputed_bytes(self._config, model, tokens, longest=longest, compiled=self._compiled)
        again = self._factors.of(tokens, recomputes=True)
        return self._copied + layers + again - (spared_bytes(model, tokens, backend.precision) if offloads else 0)

    def of_row(self, tokens: int, *, recomputes: bool, offloads: bool = False) -> int:
        """Bytes of a pass of one row, each of whose documents has `tokens`, with the loss head's.

        A layer that is computed again needs its bytes when those of the head are gone.
        """
        backend, model = self._base.backend, self._base.model
        (vocabulary, hidden), precision, count = model.get_output_embeddings().weight.shape, backend.precision, self.together * tokens
        head: int = backend.tile_bytes(vocabulary) + count * hidden * precision.compute.itemsize
        total: int = self.of_pass(count, recomputes=recomputes, offloads=offloads, longest=tokens)
        if not recomputes:
            return head + total
        layer = self.of_pass(count, recomputes=True, longest=tokens) - self._copied - input_bytes(model, count, precision)
        beside_layer: int = head + 2 * count * hidden * precision.storage.itemsize - layer
        return total + max(0, beside_layer)


def refuse_too_long(needs: PassMemory, row: int, world: World, *, free: int, recomputes: bool, offloads: bool = False) -> None:
    """Raise OutOfMemory on all ranks if a pass of a row of `row` tokens does not fit into the `free` memory of one of them."""
    needed = needs.of_row(row, recomputes=recomputes, offloads=offloads)
    if not world.max(needed > free):
        return
    fitting = longest_pass(lambda tokens: needs.of_row(tokens, recomputes=recomputes, offloads=offloads) <= _SAFE * free, most=row)
    fitting = int(-world.max(-fitting))
    ends = f"rows of up to {fitting:,} tokens fit" if fitting else "no row fits"
    cut = f"--set data.max_length={fitting}" if fitting else "a smaller --model"
    if needs.wants_offloading is False:
        cut = f"--set training.activation_offloading=auto, or {cut}"
    raise OutOfMemory(
        Problem(
            code="training.row-too-long",
            message=f"a pass of a row of {row:,} tokens needs about {show_bytes(needed)}, {show_bytes(max(0, free))} are free; {ends}",
            where="data.max_length",
            hint=cut if recomputes else f"--set training.gradient_checkpointing=true, or {cut}",
        )
    )
