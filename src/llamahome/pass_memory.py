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
from llamahome.model.place import largest_pass, longest_pass, needs_checkpointing
from llamahome.model.stream import held_bytes
from llamahome.model.targets import copied_bytes
from llamahome.training.learner import BaseModel, free_bytes
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


def resolve_memory(config: Config, base: BaseModel, world: World, *, longest: int, compiled: bool, say: Say) -> Resolved:
    """training.micro_batch_tokens and training.gradient_checkpointing where they are auto; `longest` is the longest row, in tokens.

    Raises OutOfMemory if that row needs more memory than is free, on all ranks.
    """
    training, backend, model = config.training, base.backend, base.model
    needs = PassMemory(config, base, compiled=compiled)
    free = free_bytes(backend, world) - held_bytes(model) // world.local_size
    most, resolved = documents_of_row(config) * config.data.max_length, Resolved()
    if training.method == "full":  # gradients and the state of the optimizer are not there yet
        free -= round((4 + STATE_BYTES[training.optimizer]) * sum(parameter.numel() for parameter in model.parameters()))
    tokens = training.micro_batch_tokens
    if tokens == "auto":
        tokens = backend.micro_batch_tokens
        if training.gradient_checkpointing is not True:
            tokens = largest_pass(tokens, fewest=max(backend.min_micro_batch_tokens, most), keeps=needs.kept, free_bytes=free)
        tokens = int(-world.max(-tokens))
        resolved["training.micro_batch_tokens"] = tokens, f"{backend.name} back end"
    on = training.gradient_checkpointing
    if on == "auto":
        fullest = max(tokens, most)
        kept = needs.kept(fullest)
        on = bool(world.max(needs_checkpointing(kept, free_bytes=free)))
        why = f"activations of {fullest:,} tokens take about {show_bytes(kept)}, and {show_bytes(max(0, free))} are free"
        resolved["training.gradient_checkpointing"] = on, why
        say(f"gradient checkpointing {'on' if on else 'off'}: {why}")
    refuse_too_long(needs, min(longest, config.data.max_length), world, free=free, recomputes=on)
    return resolved


class PassMemory:
    """Estimates the memory of a pass by its number of tokens."""

    def __init__(self, config: Config, base: BaseModel, *, compiled: bool) -> None:
        self._config, self._base, self._compiled = config, base, compiled
        self._copied = copied_bytes(base.model, config.lora.target_modules) if config.training.method == "lora" else 0
        self.together = documents_of_row(config)

    def kept(self, tokens: int, *, longest: int | None = None) -> int:
        """Bytes that a pass of `tokens` keeps for its backward pass; `longest` document, data.max_length by default."""
        longest = longest or self.together * self._config.data.max_length
        backend, model = self._base.backend, self._base.model
        kept: int = backend.kept_bytes(self._config, model, tokens, longest=longest, compiled=self._compiled)
        return self._copied + kept

    def of_pass(self, tokens: int, *, recomputes: bool, longest: int | None = None) -> int:
        """Bytes of the activations of a pass of `tokens`, also if layers are computed again."""
        if not recomputes:
            return self.kept(tokens, longest=longest)
        longest = longest or self.together * self._config.data.max_length
        backend, model = self._base.backend, self._base.model
        layers: int = backend.recomputed_bytes(self._config, model, tokens, longest=longest, compiled=self._compiled)
        return self._copied + layers

    def of_row(self, tokens: int, *, recomputes: bool) -> int:
        """Bytes of a pass of one row, each of whose documents has `tokens`, with the loss head's."""
        backend, width = self._base.backend, self._base.model.get_output_embeddings().weight.shape
        count = self.together * tokens
        head: int = backend.tile_bytes(width[0]) + count * width[1] * backend.precision.compute.itemsize
        return head + self.of_pass(count, recomputes=recomputes, longest=tokens)


def refuse_too_long(needs: PassMemory, row: int, world: World, *, free: int, recomputes: bool) -> None:
    """Raise OutOfMemory on all ranks if a pass of a row of `row` tokens does not fit into the `free` memory of one of them."""
    needed = needs.of_row(row, recomputes=recomputes)
    if not world.max(needed > free):
        return
    fitting = longest_pass(lambda tokens: needs.of_row(tokens, recomputes=recomputes) <= _SAFE * free, most=row)
    fitting = int(-world.max(-fitting))
    ends = f"rows of up to {fitting:,} tokens fit" if fitting else "no row fits"
    cut = f"--set data.max_length={fitting}" if fitting else "a smaller --model"
    raise OutOfMemory(
        Problem(
            code="training.row-too-long",
            message=f"a pass of a row of {row:,} tokens needs about {show_bytes(needed)}, {show_bytes(max(0, free))} are free; {ends}",
            where="data.max_length",
            hint=cut if recomputes else f"--set training.gradient_checkpointing=true, or {cut}",
        )
    )
